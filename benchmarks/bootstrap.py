"""How sure is a share or a mean that was measured on some prompts? Intervals by drawing the prompts again, with numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was measured, and between what it would lie if other prompts of the kind had been drawn."""

    value: float
    low: float
    high: float


def figure_of(
    parts: Sequence[tuple[float, float]], then: Callable[[np.ndarray], np.ndarray] = lambda values: values
) -> Figure | None:
    """The sum of all numerators over that of all denominators. None where the denominators are all 0.

    parts: (numerator, denominator) of each prompt. then: what becomes of the quotients, elementwise. The interval holds the
    middle 95 % of what 1000 draws of as many prompts give, with replacement; the draws are the same for all figures of as many
    prompts, so that rows meet the same prompts.
    """
    numerators, denominators = np.array(parts, dtype=np.float64).T  # [P]
    if not denominators.sum():
        return None
    draws = np.random.default_rng(SEED).integers(0, len(parts), (NUM_RESAMPLES, len(parts)))  # [R, P]
    sums, totals = numerators[draws].sum(axis=1), denominators[draws].sum(axis=1)  # [R]
    drawn = then(sums[totals > 0] / totals[totals > 0])  # a draw may have met only prompts without any
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (outside, 1 - outside))
    value = then(np.array([numerators.sum() / denominators.sum()]))[0]
    return Figure(value=float(value), low=float(low), high=float(high))
