"""Reports as pictures. matplotlib is imported when one is drawn, and asked for before anything is measured."""

from __future__ import annotations

import io
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from offload_sirius.bench.decode import DecodeReport
from offload_sirius.bench.link import LinkReport
from offload_sirius.bench.spread import Spread
from offload_sirius.bench.stream import StreamReport
from offload_sirius.errors import ConfigError
from offload_sirius.files import require_writable, write_whole

COLOUR_OF_TIER = {"resident": "tab:gray", "host": "tab:blue", "disk": "tab:orange"}
COLOUR_OF_MODE = {"full": "silver", "sparse": "lightsalmon", "sirius": "lightsteelblue"}
MARKER_OF_SPARSITY = {"griffin": "o", "cats": "^"}
DOTS_PER_INCH = 120


def require_plot(path: Path) -> None:
    """Raises ConfigError where no picture can be drawn, or none be written there."""
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; pip install 'offload-sirius[plot]'")
    require_writable(path, "--plot")


def plot_link(report: LinkReport, path: Path) -> None:
    """Rates over the size of a copy, the queue depth of the disk, and the length of runs. A PNG."""
    figure, (copies, disk, gathers) = _panels(3)
    for way, rates in groupby(report.copies, key=lambda rate: rate.way):
        _draw_rates(copies, way, ((rate.nbytes, rate.bytes_per_second) for rate in rates))
    _draw_rates(disk, "disk", ((rate.depth, rate.bytes_per_second) for rate in report.disk.rates))
    for way, gathered in groupby(report.gathers, key=lambda rate: rate.way):
        _draw_rates(gathers, way, ((rate.run_length, rate.bytes_per_second) for rate in gathered))
    for panel, what in ((copies, "bytes of a copy"), (disk, "reads at a time"), (gathers, "records in a run")):
        panel.set_xscale("log", base=2)
        panel.set(xlabel=what, ylabel="GB/s", ylim=(0, None))
        panel.legend()
    copies.set_title(f"copies, {report.device}")
    disk.set_title("reading from disk")
    gathers.set_title("gathered neuron records")
    _save(figure, path)


def plot_stream(report: StreamReport, path: Path) -> None:
    """Seconds of each pass beside the link's own time, and what was waited for each layer. A PNG."""
    figure, (passes, gaps) = _panels(2)
    passes.bar(range(1, len(report.all_seconds) + 1), report.all_seconds, color=COLOUR_OF_TIER["host"])
    passes.axhline(report.bound.seconds, color="black", label=report.bound.what)
    passes.set(xlabel="pass", ylabel="seconds", title=f"{report.model}: {report.link_share:.0%} of the link")
    passes.legend(loc="lower right")
    for panel in (passes, gaps):
        panel.xaxis.get_major_locator().set_params(integer=True)
    for tier, colour in COLOUR_OF_TIER.items():
        layers = [each for each in report.layers if each.tier == tier]
        if layers:
            gaps.bar([each.layer for each in layers], [each.seconds * 1e3 for each in layers], color=colour, label=tier)
    gaps.set(xlabel="layer", ylabel="milliseconds waited in a pass", title=f"{report.gap_seconds:.3f} s a pass in all")
    gaps.legend()
    _save(figure, path)


def plot_decode(report: DecodeReport, path: Path) -> None:
    """What each row costs beside the full model, and what it gives for that. A PNG."""
    figure, (times, answers) = _panels(2, height=max(4.0, 1.5 + 0.3 * len(report.rows)))
    for place, row in enumerate(report.rows):
        colour = COLOUR_OF_MODE[row.mode]
        label = row.name if row.aal is None else f"{row.name}, AAL {row.aal:.1f}"
        times.barh(place, row.ratio or 0.0, color=colour)
        times.text(0.02, place, label, va="center", fontsize=8)
        if row.effective_density is not None:
            answers.scatter(
                row.effective_density, row.agreement, color=colour, marker=MARKER_OF_SPARSITY[row.sparsity or "griffin"]
            )
    times.axvline(1.0, color="black", linewidth=1)
    times.invert_yaxis()
    times.set(yticks=[], xlabel="seconds a token, over the full model's", title=report.model)
    answers.set(
        xlabel="effective density",
        ylabel="agreement with the full model",
        ylim=(-0.03, 1.03),
        title=f"{report.num_prompts} prompts, up to {report.max_new_tokens} tokens",
    )
    for mode, colour in COLOUR_OF_MODE.items():
        answers.scatter([], [], color=colour, label=mode)
    for sparsity, marker in MARKER_OF_SPARSITY.items():
        answers.scatter([], [], color="black", marker=marker, label=sparsity)
    answers.legend()
    _save(figure, path)


def _panels(num_panels: int, height: float = 4.0) -> tuple[Any, Any]:
    # Not pyplot, which keeps every figure and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * num_panels, height), layout="constrained")
    return figure, figure.subplots(1, num_panels)


def _draw_rates(panel: Any, label: str, points: Iterable[tuple[int, Spread]]) -> None:
    """A line through the medians, and a band from lowest to highest."""
    places, rates = zip(*points, strict=True)
    panel.plot(places, [rate.median / 1e9 for rate in rates], marker=".", label=label)
    panel.fill_between(places, [rate.lowest / 1e9 for rate in rates], [rate.highest / 1e9 for rate in rates], alpha=0.2)


def _save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=DOTS_PER_INCH)
    write_whole(path, image.getvalue())
