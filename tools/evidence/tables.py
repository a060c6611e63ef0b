"""Tables of the documents, each as lines of Markdown made of a result file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from evidence.answers import answers
from evidence.results import newest, percent


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def decode() -> list[str]:
    """What ways to draft give: benchmarks/decode.py."""
    result = newest("decode")

    def cells(row: dict[str, Any]) -> list[str]:
        if row["mode"] == "full":
            ways = ["none: mode full", "", ""]
        else:
            accept = "exact" if row["accept"] == "exact" else f"threshold {row['threshold']}"
            ways = [f"{row['sparsity']}, keep {row['keep']}", accept, str(row["tree_width"])]
        aal = f"{row['aal']:.1f}" if row["aal"] else "1"
        accepted = percent(row["acceptance"]) if row["acceptance"] is not None else ""
        return [*ways, aal, accepted, f"{row['nbytes_per_token'] / 1e6:.0f}", percent(row["agreement"])]

    head = ["Draft", "Acceptance rule", "Tree width", "AAL", "Accepted", "MB a token", "Agreement with full"]
    return [*table(head, map(cells, result.rows)), *result.source]


def hotset() -> list[str]:
    """What each part of a hot set is worth: benchmarks/hotset.py."""

    def cells(row: dict[str, Any]) -> list[str]:
        aal = f"{row['aal']:.2f}" if row["aal"] else "1"
        equal = f"{row['num_equal']} of {row['num_prompts']}"
        return [
            row["name"],
            f"{row['ratio_to_full']:.2f}",
            aal,
            f"{row['nbytes_per_token'] / 1e6:.0f}",
            percent(row["busy_share"]),
            equal,
        ]

    result = newest("hotset")
    head = ["Row", "Times full", "AAL", "MB a token", "Link busy", "Answers that are mode full's"]
    return [*table(head, map(cells, result.rows)), *result.source]


def quantization() -> list[str]:
    """Quality and speed of weights in 8 and 4 bits: benchmarks/quantization.py and quantized_link.py."""
    speeds = {row["name"]: f"{row['ratio']:.2f}" for row in newest("quantized-link").rows}

    def cells(row: dict[str, Any]) -> list[str]:
        name = "float32" if row["name"] == "none" else row["name"]
        return [
            name,
            percent(row["agreement"], 1),
            f"{row['kl']:.4f}",
            f"{row['perplexity']:.1f}",
            f"{row['bytes_per_weight']:.2f}",
            speeds.get(row["name"], ""),
        ]

    head = ["Weights", "Same likeliest token", "KL", "Perplexity", "Bytes a weight", "Tokens/s over a link, times bfloat16's"]
    result = newest("quantization")
    return [*table(head, map(cells, result.rows)), *result.source]


def quality() -> list[str]:
    """What correction brings back: benchmarks/quality.py."""

    def figure(found: dict[str, float] | None, form: Callable[[float], str]) -> str:
        if found is None:
            return ""
        value, low, high = (form(found[key]) for key in ("value", "low", "high"))
        return value if low == high else f"{value} ({low} to {high})"

    def cells(row: dict[str, Any]) -> list[str]:
        if row["mode"] == "full":
            way = "full"
        else:
            tree = f", trees of {row['tree_width']}" if (row["tree_width"] or 1) > 1 else ""
            rule = {"exact": "sirius, exact", "threshold": f"sirius, threshold {row['threshold']}", None: "sparse"}[row["accept"]]
            way = f"{row['sparsity']} {row['keep']}, {rule}{tree}"
        two = "{:.2f}".format
        return [
            way,
            figure(row["density"], two),
            figure(row["identical"], percent),
            figure(row["likeliest"], percent),
            figure(row["perplexity"], two),
            figure(row["forced_agreement"], percent),
            figure(row["forced_kl"], two),
            figure(row["aal"], "{:.1f}".format),
            figure(row["acceptance"], percent),
        ]

    head = [
        "Way",
        "Density",
        "Answers identical",
        "Tokens the full model finds likeliest",
        "Perplexity by it",
        "Draft agrees",
        "KL of draft",
        "AAL",
        "Accepted",
    ]
    result = newest("quality")
    return [*table(head, map(cells, result.rows)), *result.source]


def peers() -> list[str]:
    """Systems in the same memory: benchmarks/peers.py, table memory."""

    def cells(row: dict[str, Any]) -> list[str]:
        name = row["name"] if row.get("capped", True) else f"{row['name']} (no limit)"
        said = "; ".join(filter(None, (row.get("note"), row["error"])))
        if "seconds_per_token" not in row:
            return [name, said, *[""] * 6]
        all_seconds = row["all_seconds_per_token"]

        def scaled(key: str, unit: float, form: str) -> str:
            return f"{row[key] / unit:{form}}" if row.get(key) else ""

        def ratio_cell(row: dict[str, Any]) -> str:
            ratios = row.get("all_ratios_to_full")
            return f"{row['ratio_to_full']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""

        return [
            f"{name}: {said}" if said else name,
            f"{row['seconds_per_token']:.2f} ({min(all_seconds):.2f} to {max(all_seconds):.2f})",
            ratio_cell(row),
            scaled("first_token_seconds", 1, ".2f"),
            scaled("cgroup_peak_bytes", 1e9, ".2f") or scaled("resident_peak_bytes", 1e9, ".2f"),
            scaled("read_bytes_per_token", 1e9, ".2f"),
            scaled("written_bytes", 1e9, ".2f"),
            scaled("preparation_seconds", 1, ".0f"),
        ]

    found = newest("peers")["memory"]
    if "skipped" in found:
        return [found["skipped"]]
    head = [
        "System",
        "Seconds a token",
        "Times ours, full",
        "First token, s",
        "Peak GB",
        "GB read a token",
        "GB written before",
        "in s",
    ]
    floors = [
        f"- {row['name']} takes {row['ratio_to_floor']:.2f} times the raw reads (rounds: "
        f"{', '.join(format(ratio, '.2f') for ratio in row['all_ratios_to_floor'])})"
        for row in found["rows"]
        if row.get("ratio_to_floor")
    ]
    return [*table(head, map(cells, found["rows"])), "", *floors, *newest("peers").source_of(found)]


def third() -> list[str]:
    """Mode sirius beside mode full with a third of the model's memory: benchmarks/peers.py, table third."""

    def cells(row: dict[str, Any]) -> list[str]:
        if row["error"] is not None:
            return [row["name"], row["error"], *[""] * 6]
        return [
            row["name"],
            f"{row['full_seconds_per_token']:.2f}",
            f"{row['sirius_seconds_per_token']:.2f}",
            f"{row['ratio']:.2f} ({min(row['all_ratios']):.2f} to {max(row['all_ratios']):.2f})",
            f"{row['num_sirius_equal']} of {row['num_prompts']}",
            f"{row['aal']:.1f}" if row["aal"] else "",
            f"{row['device_plan_bytes'] / 1e6:.0f}",
        ]

    head = ["Weights", "Mode full, s a token", "Mode sirius", "Times as fast", "Answers mode full's", "AAL", "Device MB"]
    result = newest("peers")
    return [*table(head, map(cells, result["third"]["rows"])), *result.source_of(result["third"])]


def paper() -> list[str]:
    """The paper's offloading table: benchmarks/paper.py."""
    found = newest("paper")["table"]
    published = found["published"]["rows"]

    def published_cells(name: str) -> list[str]:
        row = published[name]
        return [
            f"published: {name}",
            f"{row['seconds_per_token']:.2f}",
            f"{row['ratio_to_full']:.3f}",
            "",
            "",
            "",
            "",
            f"{row['score']:.4f}",
        ]

    def number(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            f"{row['group']}: {row['name']}",
            number(row["seconds_per_token"], ".2f"),
            number(row["ratio_to_full"], ".3f"),
            number(row["ratio_to_full_same_memory"], ".3f"),
            number(row["bytes_ratio"], ".3f"),
            number(row["aal"], ".2f"),
            percent(row["link_share"]),
            "",
        ]

    head = [
        "Row",
        "Seconds a token",
        "Of full, all streamed",
        "Of full, same memory",
        "Bytes, of full's",
        "AAL",
        "Link's share of the time",
        "Score",
    ]
    rows = [*map(published_cells, ("full", "sparse", "sirius")), *map(cells, found["rows"])]
    return [*table(head, rows), *newest("paper").source_of(found)]


def ablations() -> list[str]:
    """What each part of the method is worth: benchmarks/paper.py."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            row["what"],
            row["value"] + (" (base)" if row["is_base"] else ""),
            f"{row['aal']:.2f}",
            percent(row["own_agreement"]),
            percent(row["full_agreement"]),
            f"{row['bytes_ratio']:.2f}",
        ]

    head = [
        "Setting",
        "",
        "AAL",
        "Tokens the full model finds likeliest",
        "Tokens of mode full's answer",
        "Bytes a token, of mode full's",
    ]
    result = newest("paper")
    return [*table(head, map(cells, result["ablations"]["rows"])), *result.source_of(result["ablations"])]


def scale() -> list[str]:
    """How cost grows: benchmarks/scale.py."""
    result = newest("scale")

    def cells(fit: dict[str, Any]) -> list[str]:
        points = [
            point
            for point in result["points"]
            if (point["sweep"], point["setting"]) == (fit["sweep"], fit["setting"]) and fit["what"] in (point["what"], "any")
        ]
        power = fit["power"]
        exponent = (
            f"{power['exponent']:.3f} ({power['lowest']:.3f} to {power['highest']:.3f})" if power else "no growth beyond noise"
        )
        sizes = [point["size"] for point in points]
        span = f"{min(sizes):g} to {max(sizes):g}" if sizes else ""
        error = max((abs(point["error"]) for point in points), default=None)
        return [
            fit["sweep"],
            fit["setting"],
            fit["what"],
            span,
            f"{fit['expected']:g}",
            exponent,
            "" if error is None else percent(error, 1),
        ]

    head = ["What grows", "Setting", "Pass", "From, to", "Exponent expected", "Fitted", "Plan off by at most"]
    held = [f"- {each['what']}: {each['found']}" for each in result["held"]]
    return [*table(head, map(cells, result["fits"])), "", *held, *result.source]


def gpu() -> list[str]:
    """What the suite for machines with a GPU found: tools/gpu_suite.py."""
    result = newest("gpu-suite")

    def cells(part: dict[str, Any]) -> list[str]:
        verdict = {True: "holds", False: "falls short", None: "not run"}[part["held"]]
        return [part["name"], verdict, part["found"].removesuffix("[100%]").strip(" .")]  # of tests, as an older suite has it

    return [*table(["Part", "", "Found"], map(cells, result["parts"])), *result.source]


TABLES: dict[str, Callable[[], list[str]]] = {
    "answers": answers,
    "decode": decode,
    "hotset": hotset,
    "quantization": quantization,
    "quality": quality,
    "peers": peers,
    "third": third,
    "paper": paper,
    "ablations": ablations,
    "scale": scale,
    "gpu": gpu,
}
"""By the name that a document gives."""
