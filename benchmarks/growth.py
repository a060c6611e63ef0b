"""How a cost grows with what it is for: fits by least squares. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from statistics import median

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """cost = factor * size ^ exponent, by a line through the logarithms of the points' medians."""

    exponent: float
    lowest: float
    """The least exponent that any round of runs gives by itself: the first run of every point, the second, and so on."""
    highest: float
    factor: float
    largest_residual: float
    """Of a point, as a share of what the law says of it."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """cost = fixed + slope * size, by least squares of relative errors, so that small points count as much as large ones."""

    fixed: float
    slope: float
    largest_residual: float
    """As of PowerLaw."""


def power_law(sizes: Sequence[float], runs: Sequence[Sequence[float]]) -> PowerLaw:
    """Of at least two different sizes. runs: costs that were measured at each size."""
    medians = [median(each) for each in runs]
    exponent, factor = _log_fit(sizes, medians)
    # A point that has fewer runs than others stands with its median in the rounds that it lacks.
    rounds = [[middle if run is None else run for run, middle in zip(each, medians, strict=True)] for each in zip_longest(*runs)]
    exponents = [_log_fit(sizes, each)[0] for each in rounds]
    return PowerLaw(
        exponent=exponent,
        lowest=min(exponents),
        highest=max(exponents),
        factor=factor,
        largest_residual=_largest_residual(medians, [factor * size**exponent for size in sizes]),
    )


def line(sizes: Sequence[float], runs: Sequence[Sequence[float]]) -> Line:
    """Of at least two different sizes, see power_law."""
    medians = [median(each) for each in runs]
    rows = np.stack([np.ones(len(sizes)), np.array(sizes, float)], axis=1) / np.array(medians)[:, None]
    (fixed, slope), *_ = np.linalg.lstsq(rows, np.ones(len(sizes)), rcond=None)
    return Line(
        fixed=float(fixed),
        slope=float(slope),
        largest_residual=_largest_residual(medians, [float(fixed + slope * size) for size in sizes]),
    )


def beyond_first(sizes: Sequence[float], runs: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """What sizes and costs have beyond those of the first point, which is the smallest: its own fixed part is in all of them.

    Only of points that cost more than the first in every run: what is less is noise.
    """
    first, highest = median(runs[0]), max(runs[0])
    grown = [(size, each) for size, each in zip(sizes[1:], runs[1:], strict=True) if min(each) > highest]
    return [size - sizes[0] for size, _ in grown], [[run - first for run in each] for _, each in grown]


def _log_fit(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Exponent and factor."""
    exponent, log_factor = np.polyfit(np.log(sizes), np.log(costs), 1)
    return float(exponent), float(np.exp(log_factor))


def _largest_residual(costs: Sequence[float], fitted: Sequence[float]) -> float:
    return max(abs(cost / expected - 1) for cost, expected in zip(costs, fitted, strict=True))
