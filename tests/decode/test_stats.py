"""Figures of windows, computed by hand."""

from __future__ import annotations

import pytest

from offload_sirius.decode.accept import Acceptance
from offload_sirius.decode.result import Passes, TokensByOrigin
from offload_sirius.decode.stats import DecodeStats


def window(num_tokens: int, num_accepted: int, num_tried: int) -> Acceptance:
    return Acceptance(
        token_ids=(1,) * num_tokens,
        nodes=tuple(range(num_tokens)),
        num_drafted=num_accepted,
        num_accepted=num_accepted,
        num_tried=num_tried,
    )


def test_without_windows_there_are_no_figures_of_them() -> None:
    stats = DecodeStats()
    assert (stats.aal, stats.acceptance, stats.effective_density(0.6), stats.last_window, stats.mean_window) == (None,) * 5
    assert (stats.median_draft_seconds, stats.median_correction_seconds, stats.flips) == (None,) * 3
    assert (stats.passes, stats.tokens_by_origin) == (Passes(), TokensByOrigin())


def test_every_window_counts_the_last_one_too() -> None:
    stats = DecodeStats()
    stats.count_window(4, window(4, 3, 3))
    stats.count_window(4, window(2, 1, 2))
    stats.count_window(10, window(1, 0, 1))
    assert stats.aal == pytest.approx(7 / 3)
    assert stats.acceptance == pytest.approx(4 / 6)
    assert (stats.last_window, stats.mean_window) == (10, 6)


def test_a_correction_without_a_draft_tries_nothing() -> None:
    stats = DecodeStats()
    stats.count_window(2, window(1, 0, 0))
    assert (stats.aal, stats.acceptance) == (1, None)


@pytest.mark.parametrize(
    ("size", "aal", "density", "effective"),
    [
        # Tables of arXiv 2409.03856 go by ((W - 1) * d + 1) / AAL.
        (16, 15.22, 0.65, 0.7063),
        (16, 15.37, 0.76, 0.8068),
        (2, 2.0, 0.5, 0.75),
    ],
)
def test_effective_density_is_that_of_the_method(size: int, aal: float, density: float, effective: float) -> None:
    stats = DecodeStats()
    for _ in range(100):
        stats.num_passes.update({"draft": size - 1, "correction": 1})
        stats.windows.append(size)
    stats.num_advanced = round(aal * 100)
    assert stats.effective_density(density) == pytest.approx(((size - 1) * density + 1) / aal)
    assert stats.effective_density(density) == pytest.approx(effective, abs=1e-4)


def test_passes_tokens_and_times_are_given_by_kind() -> None:
    stats = DecodeStats(draft_seconds=[3.0, 1.0, 9.0], correction_seconds=[2.0, 4.0])
    stats.num_passes.update({"prefill": 1, "draft": 3, "correction": 2})
    stats.num_tokens.update({"full": 2, "draft": 5, "lookup": 3})
    stats.count_flips(0)
    stats.count_flips(2)
    assert stats.passes == Passes(prefill=1, draft=3, correction=2)
    assert stats.tokens_by_origin == TokensByOrigin(full=2, draft=5, lookup=3)
    assert (stats.median_draft_seconds, stats.median_correction_seconds, stats.flips) == (3, 3, 2)
