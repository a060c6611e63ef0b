"""Rows from answers that are written out: medians over prompts, totals where a median would not add up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from offload_sirius.bench.answers import Answer, Loaded, agreement, row_of
from offload_sirius.bench.spread import Spread
from offload_sirius.config import DecodingConfig

FULL, SPARSE = DecodingConfig(mode="full"), DecodingConfig(mode="sparse", sparsity="cats", keep=0.75)
SIRIUS = DecodingConfig(mode="sirius", window=4, accept="threshold", threshold=0.2)
LOADED = Loaded(num_streamed_layers=3, num_resident_layers=1, draft_density=0.5, link_bytes_per_second=100.0)
PLAIN = Answer(
    token_ids=(1, 2, 3, 4, 5),
    decode_seconds=8.0,
    num_windows=0,
    num_advanced=0,
    num_drafts=0,
    acceptance=None,
    draft_nbytes=0,
    nbytes=400,
    busy_share=0.9,
    cache_hit_share=None,
    step_seconds=3.0,
    draft_seconds=None,
    correction_seconds=None,
)
PLAIN_ANSWERS = [PLAIN, replace(PLAIN, decode_seconds=16.0)]
CORRECTED = Answer(
    token_ids=(1, 2, 3, 4, 5),
    decode_seconds=4.0,
    num_windows=2,
    num_advanced=4,
    num_drafts=6,
    acceptance=0.5,
    draft_nbytes=240,
    nbytes=440,
    busy_share=0.8,
    cache_hit_share=None,
    step_seconds=0.0,
    draft_seconds=0.5,
    correction_seconds=1.5,
)
OTHER = replace(CORRECTED, token_ids=(1, 9), decode_seconds=1.0, num_windows=1, num_advanced=1, num_drafts=3, acceptance=0.1)


def test_the_full_model_is_its_own_measure() -> None:
    row = row_of(FULL, PLAIN_ANSWERS, PLAIN_ANSWERS, LOADED, "full")
    assert row.seconds_per_token == Spread(median=3.0, lowest=2.0, highest=4.0)
    assert (row.ratio, row.agreement, row.num_identical, row.effective_density) == (1.0, 1.0, 2, 1.0)
    assert (row.sparsity, row.keep, row.window, row.accept, row.threshold, row.tree_width) == (None,) * 6
    assert (row.aal, row.acceptance, row.draft_seconds, row.draft_nbytes, row.draft_link_ratio, row.correction_ratio) == (
        None,
    ) * 6
    assert (row.nbytes_per_token, row.num_streamed_layers, row.num_resident_layers) == (100.0, 3, 1)


def test_corrected_answers_are_held_against_the_full_models() -> None:
    row = row_of(SIRIUS, [CORRECTED, OTHER], PLAIN_ANSWERS, LOADED, "sirius")
    assert (row.mode, row.sparsity, row.keep, row.window, row.accept, row.threshold) == (
        "sirius",
        "griffin",
        0.5,
        4,
        "threshold",
        0.2,
    )
    assert row.seconds_per_token == Spread(median=1.0, lowest=1.0, highest=1.0)
    assert row.ratio == pytest.approx(1 / 3)
    assert row.aal == pytest.approx(5 / 3)  # not the mean of 2 and 1
    assert row.acceptance == pytest.approx(0.3)
    assert row.effective_density == pytest.approx((9 * 0.5 + 3) / 5)
    assert row.nbytes_per_token == 880 / 5
    assert (row.agreement, row.num_identical) == (6 / 10, 1)
    assert (row.draft_nbytes, row.draft_seconds) == (480 / 9, 0.5)
    assert row.draft_link_ratio == pytest.approx(0.5 / (480 / 9 / 100))
    assert row.correction_ratio == 0.5


def test_what_nobody_corrects_costs_a_draft_a_token() -> None:
    answer = replace(PLAIN, num_drafts=4, draft_seconds=2.0, cache_hit_share=0.25)
    row = row_of(SPARSE, [answer], [PLAIN], LOADED, "sparse")
    assert (row.effective_density, row.cache_hit_share, row.sparsity, row.keep, row.window) == (0.5, 0.25, "cats", 0.75, None)


def test_answers_of_one_token_have_no_time_and_are_compared_all_the_same() -> None:
    short = replace(CORRECTED, token_ids=(1,), num_windows=0, num_advanced=0, num_drafts=0, acceptance=None)
    row = row_of(SIRIUS, [short], [replace(PLAIN, token_ids=(1,))], LOADED, "sirius")
    found = (row.seconds_per_token, row.ratio, row.aal, row.effective_density, row.nbytes_per_token, row.draft_nbytes)
    assert found == (None,) * 6
    assert (row.agreement, row.num_identical) == (1.0, 1)


def test_without_a_set_rate_a_draft_is_not_held_against_its_bytes() -> None:
    row = row_of(SIRIUS, [CORRECTED], [PLAIN], replace(LOADED, link_bytes_per_second=None), "sirius")
    assert row.draft_link_ratio is None


@pytest.mark.parametrize(
    ("answers", "full", "share"),
    [
        ([[1, 2, 3]], [[1, 2, 3]], 1.0),
        ([[1, 9, 3]], [[1, 2, 3]], 2 / 3),
        ([[1, 2]], [[1, 2, 3, 4]], 0.5),
        ([[1, 2, 3, 4]], [[1, 2]], 0.5),
        ([[1, 2], [5]], [[1, 2], [6]], 2 / 3),
    ],
)
def test_agreement_is_by_position_over_the_longer_answer(answers: list[list[int]], full: list[list[int]], share: float) -> None:
    assert agreement(answers, full) == share
