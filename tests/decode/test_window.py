"""Windows: how long by which figures, computed by hand, and how large a shape fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.config import MAX_AUTO_WINDOW, DecodingConfig, tree_nodes
from offload_sirius.decode.window import (
    FIRST_WINDOW,
    PRIOR_ACCEPTED,
    PRIOR_TRIED,
    WindowChooser,
    WindowShape,
    choose_together,
    expected_tokens,
    fit_line,
    fit_window,
)


def chooser_of(**decoding: int | str) -> WindowChooser:
    return WindowChooser(DecodingConfig(**decoding))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("acceptance", "window", "tokens"),
    [(0.0, 9, 1.0), (0.5, 2, 1.5), (0.5, 3, 1.75), (0.5, 4, 1.875), (0.9, 3, 2.71), (1.0, 16, 16.0)],
)
def test_a_window_gives_the_full_models_token_and_each_drafted_one_that_is_reached(
    acceptance: float, window: int, tokens: float
) -> None:
    assert expected_tokens(acceptance, window) == pytest.approx(tokens)


@pytest.mark.parametrize(
    ("corrections", "line"),
    [
        ([(4, 2.0)], (2.0, 0.0)),
        ([(4, 2.0), (4, 3.0), (4, 9.0)], (3.0, 0.0)),
        ([(4, 3.0), (8, 5.0)], (1.0, 0.5)),
        # One slow pass of five does not tip it.
        ([(2, 2.0), (4, 3.0), (6, 4.0), (8, 50.0), (10, 6.0)], (1.0, 0.5)),
        # More nodes are never cheaper, and no correction is free.
        ([(4, 5.0), (8, 3.0)], (4.0, 0.0)),
        ([(1, 0.1), (9, 8.1)], (0.0, 1.0)),
    ],
)
def test_a_correction_costs_a_fixed_time_and_some_for_each_node(
    corrections: list[tuple[int, float]], line: tuple[float, float]
) -> None:
    assert fit_line(corrections) == pytest.approx(line)


def test_a_fixed_window_stays() -> None:
    chooser = chooser_of(window=5)
    chooser.learn(num_tokens=1, num_accepted=0, num_tried=1, draft_seconds=[1.0] * 4, num_nodes=5, correction_seconds=1.0)
    assert chooser.choose() == 5


@pytest.mark.parametrize(("width", "first"), [(1, 8), (4, 8), (63, 5), (255, 2)])
def test_auto_begins_in_the_middle_as_far_as_the_tree_allows(width: int, first: int) -> None:
    assert FIRST_WINDOW == 8
    assert chooser_of(window="auto", tree_width=width).choose() == first


@pytest.mark.parametrize(
    ("num_accepted", "num_tried", "draft", "correction", "window"),
    [
        # a = (3 + accepted) / (4 + tried); tokens over seconds for W = 2, 3, ...
        # a = 1/2, both cost the same: 1.5/2 > 1.75/3.
        (0, 2, 1.0, 1.0, 2),
        # a = 1/2, correction costs 10: 1.5/11 = .1364, 1.75/12 = .1458, 1.875/13 = .1442.
        (0, 2, 1.0, 10.0, 3),
        # a = 1/2, drafting costs a hundredth: 5: 1.9375/1.04 = 1.8630, 6: 1.96875/1.05 = 1.8750, 7: 1.984375/1.06 = 1.8720.
        (0, 2, 0.01, 1.0, 6),
        # a = .75, correction costs 3: 1.75/4 = .4375, 2.3125/5 = .4625, 2.7344/6 = .4557. The first token is not drafted.
        (0, 0, 1.0, 3.0, 3),
        # a = .75, drafting is free: the longest.
        (0, 0, 0.0, 1.0, MAX_AUTO_WINDOW),
        # a = .9, correction costs 10: 8: 5.6953/17 = .33502, 9: 6.1258/18 = .34032, 10: 6.5132/19 = .34280,
        # 11: 6.8619/20 = .34310, 12: 7.1757/21 = .34170.
        (6, 6, 1.0, 10.0, 11),
    ],
)
def test_auto_takes_the_window_with_most_tokens_a_second(
    num_accepted: int, num_tried: int, draft: float, correction: float, window: int
) -> None:
    chooser = chooser_of(window="auto")
    chooser.learn(
        num_tokens=num_accepted + 1,
        num_accepted=num_accepted,
        num_tried=num_tried,
        draft_seconds=[draft] * 3,
        num_nodes=4,
        correction_seconds=correction,
    )
    assert chooser.choose() == window


def test_windows_that_share_their_passes_are_the_same_the_best_for_all_together() -> None:
    def seen(num_accepted: int, num_tried: int, **decoding: int | str) -> WindowChooser:
        chooser = chooser_of(**{"window": "auto"} | decoding)
        for _ in range(30):
            chooser.learn(
                num_tokens=num_accepted + 1,
                num_accepted=num_accepted,
                num_tried=num_tried,
                draft_seconds=[1.0] * 3,
                num_nodes=4,
                correction_seconds=8.0,
            )
        return chooser

    poor, good, fixed = seen(1, 3), seen(19, 20), seen(1, 2, window=5)
    own = (poor.choose(), good.choose())
    assert own[0] < own[1]
    common, same, its_own = choose_together([poor, good, fixed])
    assert common == same
    assert own[0] < common <= own[1]
    assert its_own == 5
    # Who has seen nothing goes along; without anybody who has, all begin in the middle.
    assert choose_together([chooser_of(window="auto"), good])[0] == choose_together([good, chooser_of(window="auto")])[0] > 1
    assert choose_together([chooser_of(window="auto")] * 2) == [FIRST_WINDOW] * 2
    assert choose_together([]) == []


def test_nodes_that_cost_time_shorten_the_windows_of_a_wide_tree() -> None:
    narrow, wide = chooser_of(window="auto", tree_width=2), chooser_of(window="auto", tree_width=8)
    for chooser in (narrow, wide):
        for num_nodes in (8, 16):
            chooser.learn(
                num_tokens=10,
                num_accepted=9,
                num_tried=10,
                draft_seconds=[1.0],
                num_nodes=num_nodes,
                correction_seconds=20.0 + num_nodes,
            )
    assert wide.choose() < narrow.choose()


def test_acceptance_begins_with_the_prior_and_forgets_slowly() -> None:
    chooser = chooser_of(window="auto")
    assert chooser.acceptance == PRIOR_ACCEPTED / PRIOR_TRIED == 0.75
    for accepted, expected in ((4, (3 + 4) / (4 + 5)), (0, (3 + 3.6) / (4 + 5.5))):
        tried = 5 if accepted else 1
        chooser.learn(num_tokens=1, num_accepted=accepted, num_tried=tried, draft_seconds=[], num_nodes=5, correction_seconds=1.0)
        assert chooser.acceptance == pytest.approx(expected)


def test_a_node_costs_what_windows_give_in_its_time() -> None:
    """Corrections take a second and half a second a node; windows give a token in four seconds."""
    chooser = chooser_of(window=4)
    assert chooser.node_price == 0
    for num_nodes, num_tokens, draft in ((4, 2, 1.0), (8, 1, 4.0)):
        assert chooser.node_price == 0  # of one kind of correction nothing is known of a node
        chooser.learn(
            num_tokens=num_tokens,
            num_accepted=num_tokens - 1,
            num_tried=num_tokens,
            draft_seconds=[draft],
            num_nodes=num_nodes,
            correction_seconds=1.0 + num_nodes / 2,
        )
    # 1 + 3 and 4 + 5 seconds, 3 tokens.
    assert chooser.node_price == pytest.approx(0.5 * 3 / 13)


def test_a_clock_that_stands_still_makes_nodes_free() -> None:
    chooser = chooser_of(window=4)
    for num_nodes in (4, 8):
        chooser.learn(num_tokens=1, num_accepted=0, num_tried=1, draft_seconds=[0.0], num_nodes=num_nodes, correction_seconds=0.0)
    assert chooser.node_price == 0


@given(windows=st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.floats(0, 9), st.floats(0, 9)), max_size=30))
def test_whatever_was_seen_a_window_is_in_range(windows: list[tuple[int, bool, float, float]]) -> None:
    chooser = chooser_of(window="auto", tree_width=3)
    for accepted, rejected, draft, correction in windows:
        chooser.learn(
            num_tokens=accepted + 1,
            num_accepted=accepted,
            num_tried=accepted + rejected,
            draft_seconds=[draft + 1e-6],
            num_nodes=1 + accepted,
            correction_seconds=correction,
        )
        assert 0 < chooser.acceptance < 1
        assert 2 <= chooser.choose() <= DecodingConfig(window="auto", tree_width=3).max_window


@pytest.mark.parametrize(
    ("left", "room", "levels", "width"),
    [
        (100, 100, 7, 3),
        (8, 100, 7, 3),
        (5, 100, 4, 3),
        (1, 100, 0, 3),
        (100, 22, 7, 3),
        (100, 21, 6, 3),
        (100, 4, 1, 3),
        (100, 3, 2, 1),
        (100, 1, 0, 1),
        (2, 3, 1, 1),
    ],
)
def test_a_window_of_eight_and_three_branches_shrinks_to(left: int, room: int, levels: int, width: int) -> None:
    assert fit_window(8, 3, left=left, room=room) == WindowShape(num_levels=levels, width=width)


@given(window=st.integers(2, 64), width=st.integers(1, 20), left=st.integers(1, 99), room=st.integers(1, 99))
def test_a_shape_fits(window: int, width: int, left: int, room: int) -> None:
    shape = fit_window(window, width, left=left, room=room)
    assert 0 <= shape.num_levels < min(window, left)
    assert tree_nodes(shape.num_levels + 1, shape.width) <= room
    assert shape.num_levels > 0 or left == 1 or room == 1
