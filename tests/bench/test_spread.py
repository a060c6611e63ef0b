"""Medians and spreads of values that are written out."""

from __future__ import annotations

import time

import pytest

from offload_sirius.bench.spread import Spread, rates_of, repeated_seconds, spread_of


def test_the_middle_and_both_ends() -> None:
    assert spread_of([5.0, 1.0, 3.0]) == Spread(median=3.0, lowest=1.0, highest=5.0)
    assert spread_of([2.0]) == Spread(median=2.0, lowest=2.0, highest=2.0)


def test_rates_are_bytes_over_seconds_the_longest_time_the_lowest_rate() -> None:
    assert rates_of(100, [1.0, 2.0, 4.0]) == Spread(median=50.0, lowest=25.0, highest=100.0)


def test_an_action_is_timed_after_one_that_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    durations = iter([100.0, 1.0, 2.0, 3.0])

    def action() -> None:
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert repeated_seconds(action, 3) == [1.0, 2.0, 3.0]
