"""Seconds a token of each system in the same memory: a picture of a result of benchmarks/peers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

OURS, THEIRS = "#0072B2", "#999999"
FLOOR_NAME = "raw reads"
STABLE = {"svg.hashsalt": "peers", "svg.fonttype": "none", "font.size": 9.5}
"""The same result makes the same file."""


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a picture of 700 pixels' width, SVG or PNG by its suffix: a bar for each system that ran, its rounds as dots."""
    table = result["memory"]
    rows = [row for row in table["rows"] if "seconds_per_token" in row]
    floor = next((row for row in rows if row["name"] == FLOOR_NAME), None)
    bars = sorted((row for row in rows if row is not floor), key=lambda row: -row["seconds_per_token"])
    with rc_context(STABLE):
        figure = Figure(figsize=(7, 1.1 + 0.45 * len(bars)), dpi=100, layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(bars):
            draw_bar(axes, place, row)
        if floor is not None:
            axes.axvline(floor["seconds_per_token"], color="black", linewidth=1, linestyle="--")
            label = f"the disk alone: {floor['seconds_per_token']:.2f} s"
            axes.annotate(
                label, (floor["seconds_per_token"], len(bars) - 0.45), xytext=(4, 0), textcoords="offset points", va="bottom"
            )
        axes.set_yticks(range(len(bars)), [row["name"] if row["capped"] else f"{row['name']}, no limit" for row in bars])
        axes.set_ylim(-0.6, len(bars) - 0.1)
        axes.set_xlim(0, 1.15 * max(max(row["all_seconds_per_token"]) for row in bars))
        axes.set_xlabel("seconds a token, median; dots are single runs")
        weights, limit = table["weights_bytes"] / 1e9, table["limit_bytes"] / 1e9
        axes.set_title(f"{weights:.1f} GB of weights in a memory limit of {limit:.1f} GB", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def draw_bar(axes: Any, place: int, row: dict[str, Any]) -> None:
    """A system."""
    colour = OURS if row["name"].startswith("ours") else THEIRS
    axes.barh(place, row["seconds_per_token"], height=0.6, color=colour, alpha=0.85 if row["capped"] else 0.4)
    axes.plot(row["all_seconds_per_token"], [place] * len(row["all_seconds_per_token"]), ".", color="black", markersize=3)
    axes.annotate(
        f"{row['seconds_per_token']:.2f}",
        (max(row["all_seconds_per_token"]), place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
    )
