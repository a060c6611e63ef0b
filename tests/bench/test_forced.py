"""Scripted acceptance: how far each window goes, and that what stands is the draft with the full model's token behind it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.bench.forced import ForcedAcceptance
from offload_sirius.bench.variants import forced_tokens, num_forced_windows
from offload_sirius.config import SamplingConfig
from offload_sirius.decode.accept import Acceptance
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.tree import Branch, DraftTree
from offload_sirius.errors import WeightReadError

GREEDY = Sampler(SamplingConfig())


def line(*token_ids: int) -> DraftTree:
    tree = DraftTree(token_ids[0])
    for parent, token_id in enumerate(token_ids[1:]):
        tree.grow([Branch(parent=parent, token_id=token_id, score=0.0)])
    return tree


def verdict(rule: ForcedAcceptance, tree: DraftTree) -> Acceptance:
    """The full model chooses token 9 behind every node: nothing of these drafts would stand."""
    logits = torch.zeros(len(tree), 10)
    logits[:, 9] = 1.0
    return rule(tree, logits, GREEDY, [0, tree.token_ids[0]], frozenset())


def test_windows_advance_by_what_the_script_says_and_the_full_model_says_what_comes_behind() -> None:
    rule = ForcedAcceptance(Fraction("2.5"))
    tree = line(1, 2, 3, 4)
    assert verdict(rule, tree) == Acceptance(token_ids=(2, 9), nodes=(0, 1), num_drafted=1, num_accepted=1, num_tried=2)
    assert verdict(rule, tree) == Acceptance(token_ids=(2, 3, 9), nodes=(0, 1, 2), num_drafted=2, num_accepted=2, num_tried=3)
    assert verdict(rule, tree).num_accepted == 1


def test_a_window_of_which_all_stands_has_one_token_more_than_was_drafted() -> None:
    rule = ForcedAcceptance(Fraction(4))
    assert verdict(rule, line(1, 2, 3, 4)) == Acceptance(
        token_ids=(2, 3, 4, 9), nodes=(0, 1, 2, 3), num_drafted=3, num_accepted=3, num_tried=3
    )


def test_a_short_draft_stands_whole_where_the_script_wants_more() -> None:
    assert verdict(ForcedAcceptance(Fraction(4)), line(1, 2)).token_ids == (2, 9)
    assert verdict(ForcedAcceptance(Fraction(4)), line(1)).token_ids == (9,)


def test_logits_that_are_no_numbers_are_refused_as_ever() -> None:
    tree = line(1, 2)
    with pytest.raises(WeightReadError):
        ForcedAcceptance(Fraction(2))(tree, torch.full((2, 10), torch.nan), GREEDY, [0, 1], frozenset())


@given(st.integers(10, 640), st.integers(1, 400))
def test_as_many_windows_fit_as_leave_no_room_for_another(tenths: int, num_tokens: int) -> None:
    aal = Fraction(tenths, 10)
    num_windows = num_forced_windows(aal, num_tokens)
    assert forced_tokens(aal, num_windows) <= num_tokens < forced_tokens(aal, num_windows + 1)


def test_five_windows_of_15_2_are_76_tokens() -> None:
    aal = Fraction("15.2")
    assert (num_forced_windows(aal, 76), num_forced_windows(aal, 75), forced_tokens(aal, 5)) == (5, 4, 76)
