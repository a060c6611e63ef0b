"""What windows are expected to give: the formula by hand, and the best window among all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.config import DecodingConfig
from offload_sirius.engine.windows import (
    ACCEPTANCES,
    PROBED_WINDOWS,
    acceptance_of_copy,
    acceptance_of_share,
    best_window,
    window_speed,
    window_speeds,
)
from offload_sirius.quantization import KINDS
from offload_sirius.weights.predict import PassBill, PassTime

NOTHING = PassBill(
    link_nbytes=0,
    pacing_seconds=0.0,
    copy_nbytes=0,
    copy_seconds=0.0,
    copy_drag_seconds=0.0,
    disk_nbytes=0,
    disk_seconds=0.0,
    weights_nbytes=0,
    weights_seconds=0.0,
    mixing_seconds=0.0,
    overhead_seconds=0.0,
    head_seconds=0.0,
    drag_seconds=0.0,
)


def taking(seconds: float) -> PassTime:
    return PassTime(seconds=seconds, nbytes=0, bill=NOTHING)


def test_a_window_gives_its_expected_tokens_in_the_time_of_its_passes() -> None:
    speed = window_speed(0.5, 3, 2.0, lambda _: taking(7.0))
    assert speed.num_tokens == 1 + 0.5 + 0.25
    assert speed.seconds_per_token == pytest.approx((2 * 2.0 + 7.0) / 1.75)
    assert window_speed(0.5, 3, 2.0, lambda _: taking(7.0), batch=2).seconds_per_token == pytest.approx(11 / 1.75 / 2)


def test_a_window_longer_than_acceptance_allows_is_slower_than_the_full_model() -> None:
    """Figures of the paper, arXiv 2409.03856: full 5.72 s a token, sparse 3.57, W = 16."""
    of_16 = [window_speed(each, 16, 3.57, lambda _: taking(5.72)).seconds_per_token for each in (0.8, 0.95, 0.9999)]
    assert of_16 == pytest.approx([12.20, 5.29, 3.71], abs=5e-3)


def test_a_window_that_is_asked_for_is_taken_for_every_acceptance() -> None:
    speeds = window_speeds(DecodingConfig(window=16), 3.57, lambda _: taking(5.72))
    assert [(each.acceptance, each.window) for each in speeds] == [(each, 16) for each in ACCEPTANCES]


def test_fewer_neurons_than_drafts_were_to_keep_are_expected_to_have_fewer_tokens_accepted() -> None:
    expected = acceptance_of_share(0.5)
    assert expected == pytest.approx(0.8 * 0.5**0.7)
    assert acceptance_of_share(1) == ACCEPTANCES[0]
    speeds = window_speeds(DecodingConfig(window=16), 3.57, lambda _: taking(5.72), expected=expected)
    assert [each.acceptance for each in speeds] == [expected, *ACCEPTANCES]
    assert speeds[0].seconds_per_token > speeds[1].seconds_per_token


def test_a_copy_is_expected_to_be_accepted_less_the_fewer_bits_and_neurons_it_has() -> None:
    shares = (0.25, 0.5, 0.75, 1.0)
    of_int8, of_int4 = ([acceptance_of_copy(kind, share) for share in shares] for kind in KINDS)
    assert of_int8 == sorted(of_int8)
    assert of_int4 == sorted(of_int4)
    assert all(fewer < more for fewer, more in zip(of_int4, of_int8, strict=True))
    assert of_int8[1] == pytest.approx(ACCEPTANCES[0], abs=0.01), "half of the neurons, as drafts in general"
    assert of_int8[3] == ACCEPTANCES[-1]
    assert of_int4[3] == pytest.approx(1 - 0.37 * 0.16)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from(ACCEPTANCES))
def test_auto_is_the_best_of_all_windows(draft: float, correction: float, acceptance: float) -> None:
    decoding = DecodingConfig()
    found = best_window(decoding, acceptance, draft, lambda _: correction)
    best = min(
        window_speed(acceptance, window, draft, lambda _: taking(correction)).seconds_per_token
        for window in range(2, decoding.max_window + 1)
    )
    chosen = window_speed(acceptance, found, draft, lambda _: taking(correction)).seconds_per_token
    assert chosen == pytest.approx(best, rel=1e-9)


def test_few_corrections_are_looked_at_and_the_chosen_ones_exactly() -> None:
    asked: list[int] = []

    def correction(window: int) -> PassTime:
        asked.append(window)
        return taking(max(1.0, 0.1 * window))

    speeds = window_speeds(DecodingConfig(), 0.05, correction)
    assert len(asked) == len(set(asked)) <= len(PROBED_WINDOWS) + len(ACCEPTANCES)
    assert [each.correction.seconds for each in speeds] == [max(1.0, 0.1 * each.window) for each in speeds]
    assert sorted(each.window for each in speeds) == [each.window for each in speeds]


def test_a_wide_tree_has_shorter_windows() -> None:
    decoding = DecodingConfig(tree_width=100)
    speeds = window_speeds(decoding, 1e-9, lambda _: taking(1.0))
    assert {each.window for each in speeds} == {decoding.max_window} == {3}
