"""Plots of the documents, drawn from result files. Each carries a digest of what it was drawn from, and by."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

from evidence.results import newest

FOLDER = Path(__file__).parents[2] / "docs" / "plots"


@dataclass(frozen=True)
class Plot:
    """A picture of a result."""

    name: str
    """Of the picture, of the result that it shows, and of the module beside this one that draws it."""

    @property
    def path(self) -> Path:
        """Where it is kept."""
        return FOLDER / f"{self.name}.svg"

    @property
    def mark(self) -> str:
        """A comment behind the picture: the digest of the result and of how it is drawn."""
        drawer = Path(__file__).with_name(f"{self.name}_plot.py")
        return f"<!-- of {hashlib.sha256(newest(self.name).path.read_bytes() + drawer.read_bytes()).hexdigest()} -->\n"


PLOTS = [Plot("quality"), Plot("peers")]


def is_current(plot: Plot) -> bool:
    """Whether the file is there and was drawn from what would be drawn now."""
    return plot.path.exists() and plot.path.read_text(encoding="utf-8").endswith(plot.mark)


def draw(plot: Plot) -> None:
    """Write the file."""
    plot.path.parent.mkdir(exist_ok=True)
    importlib.import_module(f"evidence.{plot.name}_plot").draw(newest(plot.name).figures, plot.path)
    with plot.path.open("a", encoding="utf-8") as file:
        file.write(plot.mark)
