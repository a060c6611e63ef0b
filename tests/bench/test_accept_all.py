"""Acceptance without rollback: the whole draft stands, and what the full model puts behind it."""

from __future__ import annotations

import pytest
import torch

from offload_sirius.bench.accept_all import accept_all
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


def verdict(tree: DraftTree, *end_token_ids: int) -> Acceptance:
    """The full model chooses token 5 + node behind every node: nothing of these drafts would stand."""
    logits = torch.nn.functional.one_hot(torch.arange(5, 5 + len(tree)), 10).float()
    return accept_all(tree, logits, GREEDY, [0, tree.token_ids[0]], frozenset(end_token_ids))


def test_the_whole_draft_stands_with_the_full_models_token_behind_it() -> None:
    assert verdict(line(1, 2, 3)) == Acceptance(token_ids=(2, 3, 7), nodes=(0, 1, 2), num_drafted=2, num_accepted=2, num_tried=2)


def test_nothing_follows_a_draft_that_has_ended_the_text() -> None:
    assert verdict(line(1, 2, 3), 3) == Acceptance(token_ids=(2, 3), nodes=(0, 1), num_drafted=2, num_accepted=2, num_tried=2)


def test_without_a_draft_the_full_model_gives_one_token() -> None:
    assert verdict(line(3), 3).token_ids == (5,)


def test_logits_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(WeightReadError):
        accept_all(line(1, 2), torch.full((2, 10), torch.nan), GREEDY, [0, 1], frozenset())
