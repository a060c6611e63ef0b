"""A plan as tables for people: where everything is, what a token takes and why, and what more memory would bring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from offload_sirius.cli.console import BOUNDS, purpose
from offload_sirius.cli.plan import MORE_NBYTES, Report
from offload_sirius.config import tree_nodes
from offload_sirius.engine.planning import Candidate, Planned
from offload_sirius.units import format_size
from offload_sirius.weights.predict import PassBill, PassTime, WindowSpeed

PLAIN_WIDTH = 130
"""Columns of a table where stdout is no terminal."""

WINDOW_COLUMNS = ("acceptance", "window", "tokens a window", "s a token", "tokens/s")

RIGHT = {"layers", "bytes", "seconds", *WINDOW_COLUMNS}
"""Columns of numbers."""


def print_report(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    for line in _head_lines(report):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_table("memory", ("where", "what", "layers", "bytes"), _memory_rows(report.planned)))
    console.print(_table("time", ("what", "seconds", "arithmetic"), _time_rows(report)))
    if report.prediction.windows:
        console.print(_table("windows", WINDOW_COLUMNS, _window_rows(report.prediction.windows)))
    if len(report.candidates) > 1:
        console.print(_table("candidates", ("dtype", "drafts", "s a token", "first token"), _candidate_rows(report.candidates)))
    for line in _foot_lines(report):
        console.print(line, markup=False, soft_wrap=True)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _head_lines(report: Report) -> list[str]:
    planned = report.planned
    device = planned.hardware.device
    where = "a device described by the flags" if device == "described" else f"{device}: {planned.hardware.model}"
    sequences = "1 sequence" if planned.batch == 1 else f"{planned.batch} sequences"
    lines = [f"{planned.spec.name}, {planned.dtype}, {planned.context} positions, {sequences}, on {where}"]
    return lines + ([f"shape: {report.shape.found}"] if report.shape.found else [])


def _memory_rows(planned: Planned) -> list[tuple[str, ...]]:
    plan = planned.plan
    num_layers = {
        "resident_layers": len(plan.resident_layers),
        "slots": plan.num_slots,
        "neuron_cache": len(plan.streamed_layers),
        "attention": len(plan.hot.layers) if plan.hot else 0,
        "hot_neurons": len(plan.hot.layers) if plan.hot else 0,
        "layers": len(plan.host_layers),
        "kept_neurons": len(plan.kept_layers),
    }
    rows: list[tuple[str, ...]] = []
    for where, bill, budget in (
        ("device", plan.device_bill, planned.budgets.device_nbytes),
        ("host", plan.host_bill, planned.budgets.host_nbytes),
    ):
        for what, nbytes in bill.items():
            if nbytes:
                rows.append((where, purpose(what), str(num_layers.get(what, "")), format_size(nbytes)))
        rows.append((where, f"in all, of {format_size(budget)}", "", format_size(sum(bill.values()))))
    if plan.disk_layers:
        stored = sum(planned.stored_nbytes.values()) * len(plan.disk_layers)
        passes = "passes of the full model" if set(plan.disk_layers) & set(plan.kept_layers) else "every pass"
        rows.append(("disk", f"layers read in {passes}", str(len(plan.disk_layers)), format_size(stored)))
    return rows


def _time_rows(report: Report) -> list[tuple[str, ...]]:
    prediction, prompt = report.prediction, report.prediction.prompt
    rows = [
        *(_full_rows(report) if prediction.draft is None else _draft_rows(report, prediction.draft)),
        ("computing the prompt", _number(prompt.compute_seconds), _computing(report, prompt, _num_prompt_rows(report))),
        ("first token", _number(prediction.first_token_seconds), f"{_num_prompt_rows(report)} tokens, with an empty ring"),
    ]
    return [*rows, ("load", *_load(report))]


def _full_rows(report: Report) -> list[tuple[str, ...]]:
    prediction = report.prediction
    return [
        *_bill_rows(report, "", prediction.token, report.planned.batch, sliced=False),
        ("a token", _number(prediction.seconds_per_token), _pass(report)),
    ]


def _draft_rows(report: Report, draft: PassTime) -> list[tuple[str, ...]]:
    """Draft steps, their corrections where there are any, and what both make of a token."""
    decoding, batch, windows = report.planned.config.decoding, report.planned.batch, report.prediction.windows
    num_leaves = decoding.tree_width if windows else 1
    rows = _pass_rows(report, "draft step", draft, batch * num_leaves, sliced=True)
    sharing = "" if batch == 1 else f" / {batch} sequences"
    if windows:
        num_nodes = tree_nodes(windows[0].window, decoding.tree_width)
        rows += _pass_rows(report, "correction", windows[0].correction, batch * num_nodes, sliced=False)
        making = f"{_window(windows[0], draft)}{sharing}, were {windows[0].acceptance:.0%} of the drafted tokens accepted"
    else:
        making = f"a draft step{sharing}, which nobody corrects"
    rows.append(("a token", _number(report.prediction.seconds_per_token), making))
    if report.full is not None:
        rows.append(("with mode full", _number(report.full.seconds_per_token), "a pass of the full model, planned for that mode"))
    return rows


def _window(speed: WindowSpeed, draft: PassTime) -> str:
    """(4 * 2.82 s + 4.79 s) / 3.36 tokens"""
    drafts = f"{speed.window - 1} * {_number(draft.seconds)} s"
    return f"({drafts} + {_number(speed.correction.seconds)} s) / {_number(speed.num_tokens)} tokens"


def _pass_rows(report: Report, what: str, time: PassTime, num_rows: int, *, sliced: bool) -> list[tuple[str, ...]]:
    """A pass by what it goes to, and all of it."""
    waiting = time.seconds - time.bill.bound_seconds
    idle = f", and {_number(waiting)} s in which that waits" if waiting > 0.01 * time.seconds else ""
    tokens = "1 token" if num_rows == 1 else f"{num_rows} tokens"
    passing = f"{_gb(time.nbytes)} through the slots" if time.nbytes else "nothing is streamed"
    return [
        *_bill_rows(report, f"{what}: ", time.bill, num_rows, sliced=sliced),
        (what, _number(time.seconds), f"{tokens}, bound by {BOUNDS[time.bill.bound]}{idle}; {passing}"),
    ]


def _bill_rows(report: Report, what: str, bill: PassBill, num_rows: int, *, sliced: bool) -> list[tuple[str, ...]]:
    """what: begins each row. sliced: the pass takes slices of layers, where they can cross alone."""
    return [
        *([(f"{what}link", _number(bill.link_seconds), _link(report, bill, sliced=sliced))] if bill.link_nbytes else []),
        *([(f"{what}disk", _number(bill.disk_seconds), _disk(report, bill))] if bill.disk_nbytes else []),
        (f"{what}computing", _number(bill.compute_seconds), _computing(report, bill, num_rows)),
    ]


def _link(report: Report, bill: PassBill, *, sliced: bool) -> str:
    """69 layers: 118.1 GB / 25.00 GB/s = 4.72 s"""
    plan, rates = report.planned.plan, report.rates
    there = plan.hot.layers if plan.hot and sliced else ()
    passing = [layer for layer in plan.streamed_layers if layer not in there]
    if bill.pacing_seconds:
        rate = f"{bill.link_nbytes / bill.pacing_seconds / 1e9:.2f} GB/s (emulated)"
        layers = _layers(len(passing), bill.link_nbytes, report.planned.layout.mean_nbytes)
        line = f"{layers}: {_gb(bill.link_nbytes)} / {rate} = {_number(bill.pacing_seconds)} s"
        copying = bill.copy_seconds + bill.copy_drag_seconds
        return line + (f"; but copying them takes {_number(copying)} s" if copying > bill.pacing_seconds else "")
    from_host = plan.sliceable_layers if sliced else plan.host_layers
    num_layers = len(passing if report.planned.hardware.own_memory or plan.hot else from_host)
    rate = f"{rates.link_bytes_per_second / 1e9:.2f} GB/s"
    layers = _layers(num_layers, bill.copy_nbytes, report.planned.layout.mean_nbytes)
    line = f"{layers}: {_gb(bill.copy_nbytes)} / {rate} = {_number(bill.copy_seconds)} s"
    return line + (f" + {_number(bill.copy_drag_seconds)} s as computing goes on" if bill.copy_drag_seconds else "")


def _layers(num_layers: int, nbytes: int, layer_nbytes: int) -> str:
    """70 layers, or `70 layers, 0.588 of their bytes`."""
    share = nbytes / (num_layers * layer_nbytes)
    return f"{num_layers} layers" + ("" if share == 1 else f", {_number(share)} of their bytes")


def _disk(report: Report, bill: PassBill) -> str:
    """34 layers from disk: 58.2 GB / 3.00 GB/s = 19.4 s"""
    rate = f"{report.rates.disk_bytes_per_second / 1e9:.2f} GB/s"
    num_layers, stored = len(report.planned.plan.disk_layers), sum(report.planned.stored_nbytes.values())
    share = bill.disk_nbytes / (num_layers * stored)
    what = f"{num_layers} layers from disk" + ("" if share == 1 else f", {_number(share)} of their bytes")
    return f"{what}: {_gb(bill.disk_nbytes)} / {rate} = {_number(bill.disk_seconds)} s"


def _computing(report: Report, bill: PassBill, num_rows: int) -> str:
    """80 layers: 136.9 GB / 1008 GB/s = 0.136 s + attention 0.001 s + overhead 0.009 s + head 0.002 s"""
    parts = {
        "attention": bill.mixing_seconds,
        "overhead": bill.overhead_seconds,
        "head": bill.head_seconds,
        "beside copies": bill.drag_seconds,
    }
    rest = "".join(f" + {what} {_number(seconds)} s" for what, seconds in parts.items() if seconds)
    return f"{_weights(report, bill, num_rows)} = {_number(bill.weights_seconds)} s{rest}"


def _weights(report: Report, bill: PassBill, num_rows: int) -> str:
    """Whichever of bytes and arithmetic takes the layers' time."""
    planned, rates, nbytes = report.planned, report.rates, bill.weights_nbytes
    layers = _layers(planned.spec.num_layers, nbytes, planned.layout.mean_nbytes)
    if planned.quantized_kinds and num_rows == 1:
        return f"{layers}: {_gb(nbytes)} / {nbytes / bill.weights_seconds / 1e9:.4g} GB/s"
    flops = 2 * num_rows * nbytes / planned.layout.nbytes_per_weight
    if math.isclose(bill.weights_seconds, nbytes / rates.device_bytes_per_second, rel_tol=1e-6):
        return f"{layers}: {_gb(nbytes)} / {rates.device_bytes_per_second / 1e9:.4g} GB/s"
    if math.isclose(bill.weights_seconds, flops / rates.device_flops_per_second, rel_tol=1e-6):
        return f"{layers}: {flops / 1e12:.4g} TFLOP / {rates.device_flops_per_second / 1e12:.4g} TFLOPS"
    return layers


def _pass(report: Report) -> str:
    nbytes, batch, prediction = report.planned.plan.pass_nbytes, report.planned.batch, report.prediction
    passing = f"; {_gb(nbytes)} through the slots" if nbytes else "; nothing is streamed"
    sharing = "" if batch == 1 else f" for {batch} tokens, {_gb(nbytes / batch)} each"
    waiting = prediction.seconds_per_pass - prediction.token.bound_seconds
    idle = f", and {_number(waiting)} s in which that waits" if waiting > 0.01 * prediction.seconds_per_pass else ""
    return f"one pass, bound by {BOUNDS[prediction.bound]}{idle}{passing}{sharing}"


def _load(report: Report) -> tuple[str, str]:
    planned, seconds = report.planned, report.prediction.load_seconds
    setting = planned.setting(report.rates)
    if seconds is None or setting.load_nbytes is None:
        return "", "synthetic weights are computed, not read"
    return _number(seconds), f"{_gb(setting.load_nbytes)} from disk at {report.rates.disk_bytes_per_second / 1e9:.2f} GB/s"


def _window_rows(windows: Sequence[WindowSpeed]) -> list[tuple[str, ...]]:
    return [
        (
            f"{each.acceptance:.2g}",
            str(each.window),
            _number(each.num_tokens),
            _number(each.seconds_per_token),
            _number(1 / each.seconds_per_token),
        )
        for each in windows
    ]


def _drafts(planned: Planned) -> str:
    """Where the weights of drafts are."""
    if not planned.config.decoding.drafts:
        return "none"
    if planned.plan.hot is None:
        return "streamed"
    num_hot, num_layers = len(planned.plan.hot.layers), planned.spec.num_layers
    if (form := planned.plan.hot.draft_format) is not None:
        return f"{form.kind} copy of {planned.plan.hot.num_hot} of {planned.spec.ffn_width} neurons"
    return "resident" if num_hot == num_layers else f"resident in {num_hot} of {num_layers} layers"


def _candidate_rows(candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    return [
        (
            each.planned.dtype,
            _drafts(each.planned),
            _number(each.prediction.seconds_per_token),
            _number(each.prediction.first_token_seconds),
        )
        for each in candidates
    ]


def _foot_lines(report: Report) -> list[str]:
    token, device, host = report.prediction, report.more_device, report.more_host
    more = format_size(MORE_NBYTES)
    rates = report.rates
    lines = [
        *_caveats(report),
        f"{more} more device memory: {_number(device.seconds_per_token)} s a token instead of {_number(token.seconds_per_token)}",
        f"{more} more host memory: {_number(host.seconds_per_token)} s a token instead of {_number(token.seconds_per_token)}",
        "rates: "
        + ", ".join(
            f"{what} {getattr(rates, name) / unit:.4g} {symbol} ({rates.sources[name]})"
            for what, name, unit, symbol in (
                ("link", "link_bytes_per_second", 1e9, "GB/s"),
                ("disk", "disk_bytes_per_second", 1e9, "GB/s"),
                ("device memory", "device_bytes_per_second", 1e9, "GB/s"),
                ("matmul", "device_flops_per_second", 1e12, "TFLOPS"),
                ("a layer's overhead", "layer_overhead_seconds", 1e-3, "ms"),
            )
        )
        + _quantized_rate(report),
    ]
    if "assumed" in report.prediction.sources.values() and report.planned.hardware.device != "described":
        lines.append("assumed rates may be far off; measure this machine's with `offload-sirius doctor --measure`")
    return lines


def _quantized_rate(report: Report) -> str:
    """, int4 weights 756 GB/s (assumed)"""
    rates = {kind: report.rates.of_quantized(kind) for kind in report.planned.quantized_kinds}
    return "".join(f", {kind} weights {each.bytes_per_second / 1e9:.4g} GB/s ({each.source})" for kind, each in rates.items())


def _caveats(report: Report) -> list[str]:
    """Where drafts do not pay."""
    prediction, full = report.prediction, report.full
    if prediction.draft is None or full is None:
        return []
    lines = []
    if not report.planned.plan.streamed_layers:
        lines.append("nothing is streamed: drafts save no bytes of the link, and resident layers compute all of their neurons")
    speeds = [each.seconds_per_token for each in prediction.windows] or [prediction.seconds_per_token]
    if min(speeds) >= full.seconds_per_token:
        lines.append(f"mode full is predicted to be faster: {_number(full.seconds_per_token)} s a token; use --mode full")
    return lines


def _num_prompt_rows(report: Report) -> int:
    return report.planned.batch * report.asked.prompt_tokens


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e10 else f"{nbytes / 1e9:.3f} GB"


def _number(seconds: float) -> str:
    return f"{seconds:.3g}"
