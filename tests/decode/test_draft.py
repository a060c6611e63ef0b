"""Drafts: which tokens a leaf proposes, which branches a level keeps, and what a whole tree looks like."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.config import SamplingConfig
from offload_sirius.decode.draft import Drafter, beam, best_tokens
from offload_sirius.decode.model import Ask
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.tree import DraftTree
from offload_sirius.decode.window import WindowShape
from offload_sirius.errors import WeightReadError

from .toys import Rule, ToyModel, jumble


def drafted(
    rule: Rule, levels: int, width: int, config: SamplingConfig | None = None, ends: frozenset[int] = frozenset()
) -> DraftTree:
    """A tree behind the sequence 0, 1."""
    model = ToyModel(rule)
    model.run([Ask(slot=model, kind="prefill", token_ids=[0], following="draft")])
    drafter = Drafter(
        model,
        Sampler(config or SamplingConfig()),
        end_token_ids=ends,
        stats=DecodeStats(),
        tracer=None,
        clock=lambda: 0.0,
    )
    steps, logits = drafter.draft([0, 1], WindowShape(num_levels=levels, width=width)), None
    while True:
        try:
            ask = steps.send(logits)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        assert isinstance(ask, Ask)
        (logits,) = model.run([ask])


def table(*, default: tuple[float, ...], **rows: tuple[float, ...]) -> Rule:
    """Probabilities of four tokens behind a last one, named t0, t1, ..."""

    def rule(sequence: tuple[int, ...]) -> Tensor:
        return torch.tensor(rows.get(f"t{sequence[-1]}", default)).log()

    return rule


def test_a_level_keeps_the_likeliest_paths_whichever_leaf_they_follow() -> None:
    rule = table(default=(0.25,) * 4, t1=(0.1, 0.1, 0.5, 0.3), t2=(0.4, 0.3, 0.2, 0.1), t3=(0.9, 0.1, 0.0, 0.0))
    tree = drafted(rule, levels=2, width=2)
    # .5 * .4 = .20 and .5 * .3 = .15 behind token 2, .3 * .9 = .27 behind token 3.
    assert tree.token_ids == [1, 2, 3, 0, 0]
    assert tree.parents == [-1, 0, 0, 2, 1]
    assert tree.scores == pytest.approx([0.0, *map(math.log, (0.5, 0.3, 0.27, 0.2))])


def test_a_line_takes_the_likeliest_token_each_time() -> None:
    tree = drafted(jumble(3), levels=5, width=1)
    sequence = [0, *tree.token_ids]
    assert tree.is_line
    assert all(int(jumble(3)(tuple(sequence[:end])).argmax()) == sequence[end] for end in range(2, 7))


def test_a_line_is_sampled_where_the_answer_is() -> None:
    config = SamplingConfig(temperature=1.5, seed=8)
    tree, sequence = drafted(jumble(3), levels=5, width=1, config=config), [0, 1]
    for token_id in tree.drafted_ids(5):
        assert token_id == Sampler(config).choose(jumble(3)(tuple(sequence)), len(sequence), sequence)
        sequence.append(token_id)


def test_leaves_that_end_are_not_grown() -> None:
    rule = table(default=(0.25,) * 4, t1=(0.1, 0.1, 0.5, 0.3), t3=(0.6, 0.2, 0.1, 0.1))
    tree = drafted(rule, levels=2, width=2, ends=frozenset({2}))
    assert tree.token_ids == [1, 2, 3, 0, 1]
    assert tree.parents == [-1, 0, 0, 2, 2]


def test_where_all_leaves_end_the_draft_does() -> None:
    rule = table(default=(0.25,) * 4, t1=(0.1, 0.1, 0.5, 0.3))
    assert drafted(rule, levels=5, width=2, ends=frozenset({2, 3})).num_levels == 1


def test_a_tree_is_grown_behind_the_penalty() -> None:
    rule = table(default=(0.01, 0.3, 0.29, 0.4))
    assert drafted(rule, levels=1, width=2).token_ids == [1, 3, 1]
    # Tokens 0 and 1 stand before, so token 2 comes second.
    assert drafted(rule, levels=1, width=2, config=SamplingConfig(repetition_penalty=2.0)).token_ids == [1, 3, 2]


def test_a_tree_of_a_sampled_answer_holds_only_tokens_that_may_be_drawn() -> None:
    rule = table(default=(0.1, 0.4, 0.2, 0.3))
    tree = drafted(rule, levels=3, width=4, config=SamplingConfig(temperature=1.0, top_k=2))
    assert [tree.depths.count(depth) for depth in range(4)] == [1, 2, 4, 4]
    assert set(tree.token_ids) == {1, 3}
    assert tree.scores[1:3] == pytest.approx([math.log(4 / 7), math.log(3 / 7)])


@given(
    scores=st.lists(
        st.lists(st.sampled_from([0.0, -0.5, -1.0, -2.0, -math.inf]), min_size=6, max_size=6).filter(
            lambda row: max(row) > -math.inf
        ),
        min_size=1,
        max_size=4,
    ),
    width=st.integers(1, 8),
)
def test_the_best_tokens_are_those_of_a_stable_sort(scores: list[list[float]], width: int) -> None:
    expected = [
        [(row[token_id], token_id) for token_id in sorted(range(6), key=lambda each: -row[each]) if row[token_id] > -math.inf][
            :width
        ]
        for row in scores
    ]
    assert best_tokens(torch.tensor(scores), width, position=0) == expected


def test_of_equal_paths_the_lower_parent_comes_first_then_the_lower_token() -> None:
    level = beam({3: -1.0, 4: -2.0}, [[(-2.0, 5), (-2.0, 7)], [(-0.5, 9), (-1.0, 1)]], width=3)
    assert [(each.parent, each.token_id, each.score) for each in level] == [(4, 9, -2.5), (3, 5, -3.0), (3, 7, -3.0)]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_of_logits_that_are_no_numbers_are_refused(width: int, broken: float, temperature: float) -> None:
    def rule(sequence: tuple[int, ...]) -> Tensor:
        return torch.tensor([0.0, 1.0, broken if len(sequence) == 3 else 0.0])

    with pytest.raises(WeightReadError, match=r"^position 3: the logits hold NaN or infinity"):
        drafted(rule, levels=3, width=width, config=SamplingConfig(temperature=temperature))
