"""Figures from counters."""

from __future__ import annotations

import pytest

from offload_sirius.decode.stats import DecodeStats
from offload_sirius.serve import figures
from offload_sirius.serve.figures import Figures, LinkCounters, Rates


def stats(windows: int, advanced: int, tried: int, accepted: int) -> DecodeStats:
    return DecodeStats(windows=[4] * windows, num_advanced=advanced, num_tried=tried, num_accepted=accepted)


def test_rates_are_those_of_the_last_seconds_and_end_with_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(figures.time, "perf_counter", lambda: now)
    found = Figures()
    # A second each, the first ones slow: 1 token and 1 GB a second, then 3 tokens and 2 GB.
    for second in range(20):
        now = 100.0 + second
        num_slow, num_fast = min(second, 10), max(0, second - 10)
        found.generated_tokens = num_slow + 3 * num_fast
        nbytes = (num_slow + 2 * num_fast) * 10**9
        found.stepped(LinkCounters(nbytes, 0.5 * second), [stats(2, 6, 8, 4), stats(1, 3, 2, 1)])
    assert found.rates == Rates(tokens_per_second=3.0, aal=3.0, acceptance=0.5, link_gbytes_per_second=2.0, link_busy_share=0.5)
    found.idle()
    assert found.rates == Rates()


def test_where_nothing_is_streamed_and_nothing_drafted_there_are_no_such_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((1.0, 2.0))
    monkeypatch.setattr(figures.time, "perf_counter", lambda: next(seconds))
    found = Figures()
    for num_tokens in (0, 5):
        found.generated_tokens = num_tokens
        found.stepped(LinkCounters(), [DecodeStats()])
    assert found.rates == Rates(tokens_per_second=5.0)
