"""What windows of drafts and their corrections are expected to give, by an acceptance that nobody knows beforehand.

    seconds a token = ((W - 1) * draft + correction(W)) / (1 + a + a^2 + ... + a^(W-1))

Pure arithmetic over the times of passes. Without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

from offload_sirius.config import MIN_WINDOW, DecodingConfig
from offload_sirius.decode.window import expected_tokens
from offload_sirius.quantization import Kind
from offload_sirius.weights.predict import PassTime, WindowSpeed

ACCEPTANCES = (0.8, 0.9, 0.95)
"""Shares of drafted tokens that stand, for which a speed is predicted. The first is the one that is assumed: close to what
decode/window.py believes before it has seen any, and the most careful of the three. Drafts of small models that keep half of
their neurons stay below it; large models, and --accept threshold, come above."""

LESS_BY_FEWER_NEURONS = 0.7
"""Where drafts compute fewer neurons than they were to keep, fewer tokens stand: acceptance is taken to fall with this power of
the share. SmolLM2-135M accepts 73 % of the tokens where it keeps three quarters of its neurons, and 55 % where it keeps half."""

REJECTED_OF_COPY: dict[Kind, float] = {"int8": 0.02, "int4": 0.16}
"""Share of drafted tokens that does not stand where drafts compute on a copy of all neurons of SmolLM2-135M, in windows of 8."""

REJECTED_OF_SHARE = 0.9
"""Where they compute a share of the neurons, plain ones, it is (1 - share) to this power. Both come together like independent
errors, by their squares. Accepted of SmolLM2-135M behind 10 prompts of 48 tokens, and by this formula:

    neurons     plain         int8          int4, groups of 32
    all         1     1       .98   .98     .84   .84
    3/4         .68   .71     .68   .71     .65   .67
    1/2         .51   .46     .51   .46     .50   .44
    1/4         .26   .23     .26   .23     .23   .21
"""

OF_LARGER_MODELS = 0.37
"""Models worth streaming reject fewer tokens than so small a one: so much of it, by which half of the neurons come to the 0.8
that is assumed of drafts in general."""

PROBED_WINDOWS = (2, 4, 8, 16, 32, 64)
"""A correction takes one time as long as its bytes or weights take longest, and beyond that grows with its tokens: between these
it is a line."""

Correction = Callable[[int], PassTime]
"""Window -> the pass that corrects it."""


def acceptance_of_share(share: float) -> float:
    """The first acceptance, of drafts that compute that share of the neurons that were to be kept."""
    return ACCEPTANCES[0] * math.pow(share, LESS_BY_FEWER_NEURONS)


def acceptance_of_copy(kind: Kind, share: float) -> float:
    """The first acceptance, of drafts on a copy of that kind and share of the neurons. Never above the last of the usual ones."""
    rejected = OF_LARGER_MODELS * math.hypot(REJECTED_OF_COPY[kind], math.pow(1 - share, REJECTED_OF_SHARE))
    return min(1 - rejected, ACCEPTANCES[-1])


def window_speeds(
    decoding: DecodingConfig,
    draft_seconds: float,
    correction: Correction,
    batch: int = 1,
    expected: float = ACCEPTANCES[0],
) -> tuple[WindowSpeed, ...]:
    """For each acceptance, with the window that is asked for, or the one that then gives most tokens a second.

    batch: sequences that share the passes. expected: the first acceptance, where it is another one than usual.
    """
    correction = cache(correction)
    seconds = _between(_probed(decoding), lambda window: correction(window).seconds)
    acceptances = ACCEPTANCES if expected == ACCEPTANCES[0] else (expected, *ACCEPTANCES)
    return tuple(
        window_speed(acceptance, best_window(decoding, acceptance, draft_seconds, seconds), draft_seconds, correction, batch)
        for acceptance in acceptances
    )


def window_speed(acceptance: float, window: int, draft_seconds: float, correction: Correction, batch: int = 1) -> WindowSpeed:
    """Of one window and acceptance."""
    num_tokens, corrected = expected_tokens(acceptance, window), correction(window)
    return WindowSpeed(
        acceptance=acceptance,
        window=window,
        num_tokens=num_tokens,
        seconds_per_token=((window - 1) * draft_seconds + corrected.seconds) / num_tokens / batch,
        correction=corrected,
    )


def best_window(
    decoding: DecodingConfig, acceptance: float, draft_seconds: float, correction_seconds: Callable[[int], float]
) -> int:
    """The window that is asked for; of `auto` the one that decode/window.py would choose, did it know these times."""
    if isinstance(decoding.window, int):
        return decoding.window

    def tokens_per_second(window: int) -> float:
        return expected_tokens(acceptance, window) / ((window - 1) * draft_seconds + correction_seconds(window))

    return max(range(MIN_WINDOW, decoding.max_window + 1), key=tokens_per_second)


def _probed(decoding: DecodingConfig) -> Sequence[int]:
    if isinstance(decoding.window, int):
        return [decoding.window]
    return [*(window for window in PROBED_WINDOWS if window < decoding.max_window), decoding.max_window]


def _between(windows: Sequence[int], seconds: Callable[[int], float]) -> Callable[[int], float]:
    """seconds, asked for at these windows only; between them a line."""

    def interpolated(window: int) -> float:
        for lower, upper in pairwise(windows):
            if window <= upper:
                share = (window - lower) / (upper - lower)
                return seconds(lower) * (1 - share) + seconds(upper) * share
        return seconds(window)

    return interpolated
