"""How many tokens a window shall hold: fixed, or by what acceptance was and what passes took. Knows no clock and no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, median

from offload_sirius.config import MIN_WINDOW, DecodingConfig, tree_nodes

FIRST_WINDOW = 8
"""`auto` begins with this one, before anything is known."""
PRIOR_ACCEPTED, PRIOR_TRIED = 3.0, 4.0
"""As if so many levels had been accepted of so many, so that a first rejection does not end all drafting."""
DECAY = 0.9
"""What a window's acceptance counts for when one more has come: about the last ten decide."""
NUM_TIMES = 16
"""Passes of each kind whose times are remembered: a machine gets slower and faster."""


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """What a window can hold: levels of drafted tokens, and nodes on each. Without levels it is one token, corrected alone."""

    num_levels: int
    width: int


def fit_window(window: int, width: int, *, left: int, room: int) -> WindowShape:
    """The largest shape, up to that window and width, of which nothing is drafted in vain or without room.

    left: tokens that the answer may still have; a window gives up to one more than it has levels. room: free positions of the KV
    cache, at least one; a window takes as many as it has nodes. Levels are given up first, then width.
    """
    if tree_nodes(MIN_WINDOW, width) > room:
        width = 1
    return WindowShape(num_levels=min(window - 1, left - 1, (room - 1) // width), width=width)


class WindowChooser:
    """Chooses the window that promises most tokens a second."""

    def __init__(self, decoding: DecodingConfig) -> None:
        self._fixed = decoding.window if isinstance(decoding.window, int) else None
        self._max_window = decoding.max_window
        self._width = decoding.tree_width
        self._accepted, self._tried = PRIOR_ACCEPTED, PRIOR_TRIED
        self._draft_seconds: deque[float] = deque(maxlen=NUM_TIMES)
        self._corrections: deque[tuple[int, float]] = deque(maxlen=NUM_TIMES)
        self._windows: deque[tuple[int, float]] = deque(maxlen=NUM_TIMES)
        """Tokens and seconds of each."""

    @property
    def acceptance(self) -> float:
        """Expected share of drafted levels that are accepted, each given that the one before it was; between 0 and 1."""
        return self._accepted / self._tried

    @property
    def node_price(self) -> float:
        """Tokens that one more node of a correction costs: what windows give in the time it takes. 0 until anything is known."""
        num_tokens, seconds = (sum(each) for each in zip(*self._windows, strict=True)) if self._windows else (0, 0.0)
        return fit_line(self._corrections)[1] * num_tokens / seconds if seconds > 0 else 0.0

    def learn(
        self,
        *,
        num_tokens: int,
        num_accepted: int,
        num_tried: int,
        draft_seconds: Sequence[float],
        num_nodes: int,
        correction_seconds: float,
    ) -> None:
        """What a window has shown. num_tokens: that it gave. num_nodes: tokens that its correction computed."""
        # The prior does not decay with the rest: it is what is believed when nothing was seen for long.
        self._accepted = PRIOR_ACCEPTED + (self._accepted - PRIOR_ACCEPTED) * DECAY + num_accepted
        self._tried = PRIOR_TRIED + (self._tried - PRIOR_TRIED) * DECAY + num_tried
        self._draft_seconds.extend(draft_seconds)
        self._corrections.append((num_nodes, correction_seconds))
        self._windows.append((num_tokens, sum(draft_seconds) + correction_seconds))

    def choose(self) -> int:
        """Tokens of the next window of an answer that is written by itself, at least 2."""
        return choose_together([self])[0]

    @property
    def fixed(self) -> int | None:
        """What was asked for; None where it is to be chosen."""
        return self._fixed

    @property
    def max_window(self) -> int:
        """The longest window there may be."""
        return self._max_window

    def costs(self) -> Callable[[int], float] | None:
        """Window -> seconds that its drafts and its correction take; None until any were seen."""
        if not self._draft_seconds:
            return None
        draft = median(self._draft_seconds)
        fixed, each = fit_line(self._corrections)
        return lambda window: (window - 1) * draft + fixed + each * tree_nodes(window, self._width)


def choose_together(choosers: Sequence[WindowChooser]) -> list[int]:
    """Tokens of the next window of each of several answers whose windows share their passes, at least 2.

    Windows that are asked for are as long as they are. All others are the same, the one with most tokens a second of all answers:
    what passes take hardly depends on how many take part, so whoever drafts less than another waits for it for nothing. Each has
    seen what the passes took that it shared; by their mean the seconds are told.
    """
    choosing = [chooser for chooser in choosers if chooser.fixed is None]
    costs = [cost for chooser in choosing if (cost := chooser.costs()) is not None]

    def tokens_per_second(window: int) -> float:
        num_tokens = sum(expected_tokens(chooser.acceptance, min(window, chooser.max_window)) for chooser in choosing)
        return num_tokens / mean(cost(window) for cost in costs)

    longest = max((chooser.max_window for chooser in choosing), default=MIN_WINDOW)
    common = max(range(MIN_WINDOW, longest + 1), key=tokens_per_second) if costs else FIRST_WINDOW
    return [min(common, chooser.max_window) if chooser.fixed is None else chooser.fixed for chooser in choosers]


def expected_tokens(acceptance: float, window: int) -> float:
    """Tokens that a window gives: 1 + a + a^2 + ... + a^(W-1), the full model's own and each drafted one that is reached."""
    if acceptance == 1:
        return float(window)
    return (1 - acceptance**window) / (1 - acceptance)


def fit_line(corrections: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(seconds of any correction, seconds of each node more) from (nodes, seconds) pairs, at least one.

    Theil-Sen: medians of slopes and of what they leave, so that a few slow passes do not tip it. Neither is below 0: a
    correction does not get cheaper by more nodes, and none is free.
    """
    slopes = [(t - s) / (n - m) for (m, s), (n, t) in combinations(corrections, 2) if m != n]
    each = max(0.0, median(slopes)) if slopes else 0.0
    return max(0.0, median(seconds - each * nodes for nodes, seconds in corrections)), each
