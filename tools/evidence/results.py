"""The result files of the benchmarks: the newest of each name, and the words for where it was measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
NAME = re.compile(r"(?P<name>[a-z0-9-]+)-(?P<date>\d{4}-\d{2}-\d{2})\.json")


class MissingResultError(Exception):
    """There is no file of that name. The message says which, and where it was looked for."""


@dataclass(frozen=True)
class Result:
    """What a benchmark has left."""

    path: Path
    figures: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.figures[key]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of its table."""
        return list(self.figures["rows"])

    def row(self, **values: Any) -> dict[str, Any]:
        """The first row that has all these values. Raises KeyError."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in values.items()):
                return row
        raise KeyError(f"{self.path.name}: no row with {values}")

    @property
    def measured(self) -> str:
        """Date and processor: `2026-11-25, AMD EPYC`."""
        machine = self.figures["machine"]
        processor = machine["gpu"] or machine["cpu"].replace("(R)", "").replace(" Processor", "")
        return f"{self.figures['date']}, {processor}"

    @property
    def source(self) -> list[str]:
        """Lines below a table: `Measured 2026-11-25, AMD EPYC, by ...`."""
        return self.source_of(self.figures)

    def source_of(self, part: dict[str, Any]) -> list[str]:
        """The same of a part that may have a command of its own."""
        by = f", by `{part['command']}`" if "command" in part else ""
        return ["", f"Measured {self.measured}{by}."]


@cache
def newest(name: str) -> Result:
    """Of `NAME-DATE.json` the one with the latest date. Raises MissingResultError."""
    dated = [
        (match["date"], path) for path in RESULTS.iterdir() if (match := NAME.fullmatch(path.name)) and match["name"] == name
    ]
    if not dated:
        raise MissingResultError(f"no result file {name}-DATE.json in {RESULTS}")
    path = max(dated)[1]
    return Result(path, json.loads(path.read_text(encoding="utf-8")))


def percent(share: float, digits: int = 0) -> str:
    """`0.123` as `12%`."""
    return f"{share:.{digits}%}"


def listed(values: list[str]) -> str:
    """`a, b and c`."""
    return values[0] if len(values) == 1 else ", ".join(values[:-1]) + " and " + values[-1]
