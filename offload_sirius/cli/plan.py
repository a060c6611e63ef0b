"""`offload-sirius plan`: what goes where and how fast it will be, before anything is loaded, for machines one has and others."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_sirius.cli import flags
from offload_sirius.config import DecodingConfig, EngineConfig, PlanConfig
from offload_sirius.units import GIB, format_size

if TYPE_CHECKING:
    from offload_sirius.engine.planning import Candidate, Planned
    from offload_sirius.rates import Rates
    from offload_sirius.weights.predict import PassBill, Prediction
    from offload_sirius_loaders.shape import Shape

EXAMPLES = """\b
Examples:
  offload-sirius plan --model llama-3-8b --device-memory 6GiB
  offload-sirius plan --model llama-3-70b --device-memory 24GiB --host-memory 64GiB --link-gbps 25 --device-gbps 1008
"""

MORE_NBYTES = 4 * GIB
"""What the plan is made with once more, to say what buying it would bring."""

PLAIN_WIDTH = 130
"""Columns of a table where stdout is no terminal."""

_ENGINE, _DECODING, _PLAN = EngineConfig(), DecodingConfig(), PlanConfig()


def plan(
    model: flags.Model = _ENGINE.model,
    mode: flags.Mode = _DECODING.mode,
    sparsity: flags.Sparsity = _DECODING.sparsity,
    keep: flags.Keep = _DECODING.keep,
    window: flags.Window = str(_DECODING.window),
    tree_width: flags.TreeWidth = _DECODING.tree_width,
    device: flags.Device = _ENGINE.device,
    device_memory: flags.DeviceMemory = _ENGINE.device_memory,
    host_memory: flags.HostMemory = _ENGINE.host_memory,
    link_gbps: flags.LinkGbps = _ENGINE.link_gbps,
    dtype: flags.Dtype = _ENGINE.dtype,
    max_context: flags.MaxContext = _ENGINE.max_context,
    auto: flags.Auto = _ENGINE.auto,
    device_tflops: flags.DeviceTflops = _PLAN.device_tflops,
    device_gbps: flags.DeviceGbps = _PLAN.device_gbps,
    disk_gbps: flags.DiskGbps = _PLAN.disk_gbps,
    prompt_tokens: flags.PromptTokens = _PLAN.prompt_tokens,
    batch: flags.Batch = _PLAN.batch,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=flags.OUTPUT)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the traceback of an error.", rich_help_panel=flags.OUTPUT)
    ] = False,
) -> None:
    """Say what goes where and how fast a model will be, without loading it: on this machine, or on one that the flags describe.

    Rates of a device (--device-tflops, --device-gbps) describe one with memory of its own; so do a size in bytes for
    --device-memory and a --link-gbps where this machine has less. --link-gbps is then its link's real rate.
    """
    decoding = DecodingConfig(
        mode=mode,  # type: ignore[arg-type]  # checked by DecodingConfig
        sparsity=sparsity,  # type: ignore[arg-type]
        keep=keep,
        window=window,
        tree_width=tree_width,
    )
    config = EngineConfig(
        model=model,
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        link_gbps=link_gbps,
        dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
        max_context=max_context,
        auto=auto,
        decoding=decoding,
    )
    asked = PlanConfig(
        device_tflops=device_tflops, device_gbps=device_gbps, disk_gbps=disk_gbps, prompt_tokens=prompt_tokens, batch=batch
    )
    report = _report(config, asked)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        _print(report)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything there is to say."""

    shape: Shape
    asked: PlanConfig
    candidates: Sequence[Candidate]
    """The first is the plan."""
    rates: Rates
    more_device: Prediction
    more_host: Prediction

    @property
    def planned(self) -> Planned:
        """The plan."""
        return self.candidates[0].planned

    @property
    def prediction(self) -> Prediction:
        """What may be expected of it."""
        return self.candidates[0].prediction

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        from dataclasses import asdict

        from offload_sirius.engine.planning import plan_figures, prediction_figures
        from offload_sirius.rates import NAMES

        return {
            "model": self.planned.spec.name,
            "shape": self.shape.found or None,
            "batch": self.planned.batch,
            "prompt_tokens": self.asked.prompt_tokens,
            "plan": plan_figures(self.planned) | {"predicted": prediction_figures(self.prediction)},
            "token_bill": asdict(self.prediction.token),
            "prompt_bill": asdict(self.prediction.prompt),
            "rates": {name: {"value": getattr(self.rates, name), "source": self.rates.sources[name]} for name in NAMES},
            "with_4_gib_more": {
                "device": prediction_figures(self.more_device),
                "host": prediction_figures(self.more_host),
            },
            "candidates": [
                {"dtype": each.planned.dtype, "predicted": prediction_figures(each.prediction)} for each in self.candidates
            ],
        }


def _report(config: EngineConfig, asked: PlanConfig) -> Report:
    # Imported here: they take a quarter of a second that `--help` shall not.
    from offload_sirius.cache import cache_folder
    from offload_sirius.cli.console import say
    from offload_sirius.engine.planning import (
        Candidate,
        candidates,
        hardware_asked_for,
        plan_model,
        rates_asked_for,
        require_prompt,
    )
    from offload_sirius.rates import rates_file, read_rates
    from offload_sirius_loaders.shape import open_shape

    stored = read_rates(rates_file(cache_folder()))
    if stored.problem:
        say(stored.problem)
    shape = open_shape(config.model)
    require_prompt(config, shape.checkpoint.spec, asked.prompt_tokens)
    hardware = hardware_asked_for(config, asked, stored)

    def consider(config: EngineConfig) -> Candidate:
        planned = plan_model(shape.checkpoint, config, hardware, batch=asked.batch, computed=shape.computed)
        rates = rates_asked_for(hardware, planned.dtype, stored, config, asked)
        return Candidate(planned=planned, prediction=planned.predict(rates, asked.prompt_tokens))

    found = candidates(config, shape.checkpoint.spec, consider)
    planned = found[0].planned
    rates = rates_asked_for(hardware, planned.dtype, stored, config, asked)
    return Report(
        shape=shape,
        asked=asked,
        candidates=found,
        rates=rates,
        more_device=planned.with_more(device_nbytes=MORE_NBYTES).predict(rates, asked.prompt_tokens),
        more_host=planned.with_more(host_nbytes=MORE_NBYTES).predict(rates, asked.prompt_tokens),
    )


def _print(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PLAIN_WIDTH)
    for line in _head_lines(report):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_table("memory", ("where", "what", "layers", "bytes"), _memory_rows(report.planned)))
    console.print(_table("time", ("what", "seconds", "arithmetic"), _time_rows(report)))
    if len(report.candidates) > 1:
        console.print(_table("candidates", ("dtype", "s a token", "first token"), _candidate_rows(report.candidates)))
    for line in _foot_lines(report):
        console.print(line, markup=False, soft_wrap=True)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("layers", "bytes", "seconds", "s a token") else "left")
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
    num_layers = {"resident_layers": len(plan.resident_layers), "slots": plan.num_slots, "layers": len(plan.host_layers)}
    rows: list[tuple[str, ...]] = []
    for where, bill, budget in (
        ("device", plan.device_bill, planned.budgets.device_nbytes),
        ("host", plan.host_bill, planned.budgets.host_nbytes),
    ):
        for what, nbytes in bill.items():
            if nbytes:
                rows.append((where, what.replace("_", " "), str(num_layers.get(what, "")), format_size(nbytes)))
        rows.append((where, f"in all, of {format_size(budget)}", "", format_size(sum(bill.values()))))
    if plan.disk_layers:
        stored = sum(planned.stored_nbytes.values()) * len(plan.disk_layers)
        rows.append(("disk", "layers read in every pass", str(len(plan.disk_layers)), format_size(stored)))
    return rows


def _time_rows(report: Report) -> list[tuple[str, ...]]:
    token, prompt = report.prediction.token, report.prediction.prompt
    rows = [
        *([("link", _number(token.link_seconds), _link(report))] if token.link_nbytes else []),
        *([("disk", _number(token.disk_seconds), _disk(report))] if token.disk_nbytes else []),
        ("computing", _number(token.compute_seconds), _computing(report, token, report.planned.batch)),
        ("a token", _number(report.prediction.seconds_per_token), _pass(report)),
        ("computing the prompt", _number(prompt.compute_seconds), _computing(report, prompt, _num_prompt_rows(report))),
        ("first token", _number(report.prediction.first_token_seconds), f"{_num_prompt_rows(report)} tokens, with an empty ring"),
    ]
    return [*rows, ("load", *_load(report))]


def _link(report: Report) -> str:
    """69 layers: 118.1 GB / 25.00 GB/s = 4.72 s"""
    token, plan, rates = report.prediction.token, report.planned.plan, report.rates
    if token.pacing_seconds:
        rate = f"{token.link_nbytes / token.pacing_seconds / 1e9:.2f} GB/s (emulated)"
        line = f"{len(plan.streamed_layers)} layers: {_gb(token.link_nbytes)} / {rate} = {_number(token.pacing_seconds)} s"
        copying = token.copy_seconds + token.copy_drag_seconds
        return line + (f"; but copying them takes {_number(copying)} s" if copying > token.pacing_seconds else "")
    num_layers = len(plan.streamed_layers if report.planned.hardware.own_memory else plan.host_layers)
    rate = f"{rates.link_bytes_per_second / 1e9:.2f} GB/s"
    line = f"{num_layers} layers: {_gb(token.copy_nbytes)} / {rate} = {_number(token.copy_seconds)} s"
    return line + (f" + {_number(token.copy_drag_seconds)} s as computing goes on" if token.copy_drag_seconds else "")


def _disk(report: Report) -> str:
    """34 layers from disk: 58.2 GB / 3.00 GB/s = 19.4 s"""
    token, rate = report.prediction.token, f"{report.rates.disk_bytes_per_second / 1e9:.2f} GB/s"
    num_layers = len(report.planned.plan.disk_layers)
    return f"{num_layers} layers from disk: {_gb(token.disk_nbytes)} / {rate} = {_number(token.disk_seconds)} s"


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
    planned, rates = report.planned, report.rates
    num_layers, nbytes = planned.spec.num_layers, planned.layout.nbytes
    read = f"{num_layers} layers: {_gb(num_layers * nbytes)} / {rates.device_bytes_per_second / 1e9:.4g} GB/s"
    flops = 2 * num_rows * num_layers * nbytes // planned.layout.element_nbytes
    if math.isclose(bill.weights_seconds, num_layers * nbytes / rates.device_bytes_per_second, rel_tol=1e-6):
        return read
    if math.isclose(bill.weights_seconds, flops / rates.device_flops_per_second, rel_tol=1e-6):
        return f"{num_layers} layers: {flops / 1e12:.4g} TFLOP / {rates.device_flops_per_second / 1e12:.4g} TFLOPS"
    return f"{num_layers} layers"


def _pass(report: Report) -> str:
    from offload_sirius.cli.console import BOUNDS

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


def _candidate_rows(candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    return [
        (each.planned.dtype, _number(each.prediction.seconds_per_token), _number(each.prediction.first_token_seconds))
        for each in candidates
    ]


def _foot_lines(report: Report) -> list[str]:
    token, device, host = report.prediction, report.more_device, report.more_host
    more = format_size(MORE_NBYTES)
    rates = report.rates
    lines = [
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
        ),
    ]
    if "assumed" in rates.sources.values() and report.planned.hardware.device != "described":
        lines.append("assumed rates may be far off; measure this machine's with `offload-sirius doctor --measure`")
    return lines


def _num_prompt_rows(report: Report) -> int:
    return report.planned.batch * report.asked.prompt_tokens


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e10 else f"{nbytes / 1e9:.3f} GB"


def _number(seconds: float) -> str:
    return f"{seconds:.3g}"
