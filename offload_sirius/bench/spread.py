"""Several measurements of one thing: the one in the middle, and how far apart they lie. Knows nothing of what is measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NUM_REPEATS = 5
"""Measurements of each figure, where nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What several measurements say together."""

    median: float
    lowest: float
    highest: float


def spread_of(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values))


def rates_of(nbytes: int, seconds: Sequence[float]) -> Spread:
    """Bytes a second, where each measurement moved nbytes."""
    return spread_of([nbytes / each for each in seconds])


def repeated_seconds(action: Callable[[], object], num_repeats: int) -> list[float]:
    """Seconds that an action takes, over and over; a first one more is warm-up. It must return when its work is done."""
    action()
    return [_seconds(action) for _ in range(num_repeats)]


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began
