"""Quality against density, with and without correction: a picture of a result of quality.py.

python tools/evidence/quality_plot.py benchmarks/results/quality-DATE.json quality.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

Row = dict[str, Any]

COLOURS = {"griffin": "#0072B2", "cats": "#D55E00"}
"""Of Okabe and Ito's palette, which those who do not tell red from green can tell apart."""
MARKERS = {"sparse": "o", "exact": "s", "threshold": "^"}
WORDS = {"sparse": "sparse, no correction", "exact": "sirius, exact", "threshold": "sirius, threshold"}
LABELS = {
    "likeliest": "tokens that the full model\nfinds likeliest",
    "identical": "answers identical\nto the full model's",
    "score": "problems answered right",
}
TICKS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
Size = tuple[float, float]
LETTER_SIZE: Size = (6.0, 11.0)
MARKER_SIZE: Size = (9.0, 9.0)
PLACES = ((1, 9), (-1, 9), (1, -9), (-1, -9), (1, 0), (-1, 0), (0, 14), (0, -14), (0, 22), (0, -22))
"""Of a label beside its point: half widths to the right, and pixels up. The first free one is taken."""
STABLE = {"svg.hashsalt": "quality", "svg.fonttype": "none"}
"""The same result makes the same file."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a picture 700 pixels wide, SVG or PNG by its suffix. result: as the file has it; scores are shown if it has any."""
    with rc_context(STABLE | {"font.size": 9.5}):
        figure = Figure(figsize=(7, 7), dpi=100, layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        names = ("likeliest", "identical" if result["rows"][0]["score"] is None else "score")
        for panel, name in zip(panels, names, strict=True):
            draw_panel(panel, result["rows"], name)
            panel.set_ylabel(LABELS[name])
        panels[-1].set_xlabel("density: parameters read for a token, as a share of the model's (log scale)")
        asked = f"{result['num_prompts']} prompts, answers of up to {result['max_new_tokens']} tokens"
        panels[0].set_title(f"{result['model']}, {asked}, windows of {result['window']}", fontsize=10)
        figure.legend(handles=legend_of(result["rows"]), loc="outside lower center", ncols=3, frameon=False)
        figure.draw_without_rendering()  # before that it is not known where points are
        for panel, name in zip(panels, names, strict=True):
            label_points(panel, result["rows"], name)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def draw_panel(panel: Axes, rows: list[Row], name: str) -> None:
    """A point for each row with its interval; rows that differ in nothing but what is kept are joined by a line.

    rows: the full model's first.
    """
    series: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        if row["sparsity"] is not None:
            series.setdefault((row["sparsity"], way_of(row), row["tree_width"] or 1), []).append(row)
    for (sparsity, way, width), found in series.items():
        found.sort(key=lambda row: row["keep"])
        x, y = ([row[figure]["value"] for row in found] for figure in ("density", name))
        low, high = ([abs(row[name][end] - row[name]["value"]) for row in found] for end in ("low", "high"))
        panel.errorbar(
            x,
            y,
            yerr=(low, high),
            color=COLOURS[sparsity],
            marker=MARKERS[way],
            markersize=7,
            markerfacecolor="white" if way == "sparse" else COLOURS[sparsity],
            linestyle="-" if width == 1 else ":",
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
        )
    panel.plot(1, rows[0][name]["value"], marker="*", markersize=13, color="black", linestyle="none")
    panel.axvline(1, color="grey", linewidth=0.7, zorder=0)
    panel.set_xscale("log")
    panel.set_ylim(-0.1, 1.15)
    panel.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    panel.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    panel.xaxis.set_major_locator(FixedLocator(TICKS))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.margins(x=0.08)
    panel.grid(axis="y", linewidth=0.4, alpha=0.6)
    panel.spines[["top", "right"]].set_visible(False)


def label_points(panel: Axes, rows: list[Row], name: str) -> None:
    """Beside each point what is kept, where no other point or label is if there is such a place."""
    points = [panel.transData.transform((row["density"]["value"], row[name]["value"])) for row in rows]  # in pixels
    taken = [(x, y, MARKER_SIZE) for x, y in points]
    for (x, y), row in zip(points, rows, strict=True):
        text = "full model" if row["sparsity"] is None else f"{row['keep']:g}"
        width = LETTER_SIZE[0] * len(text)
        places = [(x + dx * (width / 2 + 5), y + dy) for dx, dy in PLACES]
        free = [place for place in places if not any(overlap((*place, (width, LETTER_SIZE[1])), each) for each in taken)]
        best = (free or places)[0]
        taken.append((*best, (width, LETTER_SIZE[1])))
        label = panel.annotate(
            text,
            (row["density"]["value"], row[name]["value"]),
            xytext=((best[0] - x) * 72 / panel.figure.dpi, (best[1] - y) * 72 / panel.figure.dpi),
            textcoords="offset points",
            color=COLOURS.get(row["sparsity"], "black"),
            fontsize=8,
            ha="center",
            va="center",
        )
        label.set_in_layout(False)


def overlap(one: tuple[float, float, Size], other: tuple[float, float, Size]) -> bool:
    """Whether two boxes do, each given by its centre and its size."""
    (x, y, (width, height)), (u, v, (breadth, depth)) = one, other
    return abs(x - u) < (width + breadth) / 2 and abs(y - v) < (height + depth) / 2


def way_of(row: Row) -> str:
    """A key of MARKERS."""
    return str(row["accept"] or row["mode"])


def legend_of(rows: list[Row]) -> list[Line2D]:
    """What of colours, shapes and lines occurs."""
    drafting = [row for row in rows if row["sparsity"] is not None]
    colours = [
        Line2D([], [], color=colour, linewidth=5, label=f"{name}, neurons kept beside each point")
        for name, colour in COLOURS.items()
        if any(row["sparsity"] == name for row in drafting)
    ]
    shapes = [
        Line2D(
            [],
            [],
            color="black",
            linestyle="none",
            marker=marker,
            markerfacecolor="white" if way == "sparse" else "black",
            label=WORDS[way],
        )
        for way, marker in MARKERS.items()
        if any(way_of(row) == way for row in drafting)
    ]
    trees = (
        [Line2D([], [], color="black", linestyle=":", label="drafted as trees")]
        if any((row["tree_width"] or 1) > 1 for row in drafting)
        else []
    )
    return [*colours, *shapes, *trees]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
