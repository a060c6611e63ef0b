"""What is grafted upon drafts: by hand, within its limits, and as far as it has paid."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.decode.accept import Acceptance
from offload_sirius.decode.lookup import DECAY, PRIOR_STOOD, PRIOR_TRIED, Lookup
from offload_sirius.decode.tree import Branch, DraftTree

from .trees import trees

NO_END: frozenset[int] = frozenset()


def line_of(root: int, *token_ids: int) -> DraftTree:
    tree = DraftTree(root)
    for parent, token_id in enumerate(token_ids):
        tree.grow([Branch(parent=parent, token_id=token_id, score=0.0)])
    return tree


def grafted(tree: DraftTree) -> list[tuple[int, int]]:
    """(parent, token) of what was not drafted."""
    return [(tree.parents[node], tree.token_ids[node]) for node in range(tree.num_drafted, len(tree))]


def graft(tree: DraftTree, sequence: list[int], lookup: Lookup | None = None, **limits: Any) -> list[tuple[int, int]]:
    limits = {"num_levels": 9, "num_nodes": 16, "acceptance": 0.75, "price": 0.0} | limits
    (lookup or Lookup(NO_END)).graft(tree, sequence, **limits)
    return grafted(tree)


def test_what_followed_before_is_grafted_at_the_root() -> None:
    assert graft(line_of(2), [1, 2, 3, 4, 5, 1, 2], num_levels=3) == [(0, 3), (1, 4), (2, 5)]


def test_nothing_is_grafted_where_the_last_tokens_never_stood_before() -> None:
    assert graft(line_of(7, 8), [1, 2, 3, 7]) == []


def test_a_copy_that_comes_to_the_end_of_the_text_goes_on_with_itself() -> None:
    assert graft(line_of(2), [1, 2, 3, 1, 2], num_levels=5) == [(0, 3), (1, 1), (2, 2), (3, 3), (4, 1)]


def test_a_branch_leaves_the_draft_where_both_differ() -> None:
    """Drafted is 3, 9; the text goes on with 3, 4, 5: looked up behind the root it is the draft's own, behind 3 it is not."""
    assert graft(line_of(2, 3, 9), [1, 2, 3, 4, 5, 1, 2], num_levels=3) == [(1, 4), (3, 5)]


def test_what_follows_the_last_drafted_token_makes_a_line_longer() -> None:
    tree = line_of(2, 3)
    assert graft(tree, [1, 2, 3, 4, 5, 1, 2], num_levels=3) == [(1, 4), (2, 5)]
    assert tree.is_line
    assert tree.num_levels == 1


def test_behind_an_end_token_nothing_is_grafted() -> None:
    lookup = Lookup(frozenset({4}))
    assert graft(line_of(2), [1, 2, 3, 4, 5, 1, 2], lookup) == [(0, 3), (1, 4)]
    assert graft(line_of(2, 3, 4), [1, 2, 3, 4, 5, 1, 2], lookup) == []


def test_the_most_promising_are_grafted_first() -> None:
    """Behind the root, behind which nothing was drafted, two tokens match, and each further token of a copy is less likely."""
    sequence = [5, 1, 2, 3, 8, 8, 7, 3, 4, 4, 4, 5, 1, 2]
    tree = DraftTree(2)
    tree.grow([Branch(parent=0, token_id=7, score=0.0)])
    # At the root three tokens match, behind 7 none does.
    assert graft(tree, sequence, num_nodes=2) == [(0, 3), (2, 8)]
    # A draft that is always right leaves nothing to the root.
    assert graft(line_of(2, 7), sequence, acceptance=1.0) == []


def test_a_node_that_promises_less_than_it_costs_is_not_grafted() -> None:
    """With a prior of 3/4 the tokens of a copy promise 0.75, 0.5625, 0.4219."""
    assert PRIOR_STOOD / PRIOR_TRIED == 0.75
    for price, num_nodes in ((0.8, 0), (0.75, 0), (0.7, 1), (0.5, 2), (0.0, 9)):
        assert len(graft(line_of(2), [1, 2, 3, 4, 5, 1, 2], price=price)) == num_nodes


def test_beside_a_draft_a_copy_counts_only_where_that_is_wrong_and_only_if_it_gets_there() -> None:
    """Behind 3: reached with 3/4, and there the draft is wrong with 1/4, and the copy right with 3/4."""
    worth = 0.75 * 0.25 * 0.75
    for price, num_nodes in ((worth, 0), (worth - 1e-9, 1)):
        assert len(graft(line_of(2, 3, 9), [1, 2, 3, 4, 1, 2], price=price, num_levels=2)) == num_nodes


def acceptance(*nodes: int, num_drafted: int) -> Acceptance:
    return Acceptance(
        token_ids=(1,) * len(nodes),
        nodes=nodes,
        num_drafted=num_drafted,
        num_looked_up=len(nodes) - 1 - num_drafted,
        num_accepted=num_drafted,
        num_tried=num_drafted,
    )


@pytest.mark.parametrize(
    ("nodes", "num_drafted", "of_three", "of_four"),
    [
        # 3 was drafted and 9 behind it, nodes 1 and 2; 4 was copied behind 3, where three tokens match, and 5 behind it, where
        # that makes four: nodes 3 and 4. (stood, tried) of each.
        ((0, 1, 3, 4), 1, (1, 1), (1, 1)),
        ((0, 1, 3), 1, (1, 1), (0, 1)),
        ((0, 1), 1, (0, 1), (0, 0)),
        # The draft was right, or the path did not come so far: nothing is known of the copy.
        ((0, 1, 2), 2, (0, 0), (0, 0)),
        ((0,), 0, (0, 0), (0, 0)),
    ],
)
def test_a_copy_is_tried_where_the_path_leaves_the_draft(
    nodes: tuple[int, ...], num_drafted: int, of_three: tuple[int, int], of_four: tuple[int, int]
) -> None:
    lookup, tree = Lookup(NO_END), line_of(2, 3, 9)
    assert graft(tree, [1, 2, 3, 4, 5, 1, 2], lookup, num_levels=3) == [(1, 4), (3, 5)]
    lookup.learn(tree, acceptance(*nodes, num_drafted=num_drafted))
    for length, (stood, tried) in ((4, of_four), (3, of_three), (2, (0, 0))):
        assert lookup.hit_share(length) == (PRIOR_STOOD + stood) / (PRIOR_TRIED + tried)


def test_what_did_not_pay_is_forgotten_and_tried_again() -> None:
    lookup, sequence, price = Lookup(NO_END), [1, 2, 3, 4, 5, 1, 2], 0.6
    grafts = []
    for _ in range(100):
        tree = line_of(2)
        grafts.append(len(graft(tree, sequence, lookup, price=price)))
        lookup.learn(tree, acceptance(0, num_drafted=0))
    # Behind one that did not stand .75 of 1 + .98^n, and that is above 0.6 when .98^n is below .25: n = 69.
    assert DECAY == 0.98
    assert grafts == [1, *[0] * 69, 1, *[0] * 29]


@given(
    tree=trees(),
    before=st.lists(st.integers(0, 3), max_size=30),
    num_levels=st.integers(0, 8),
    num_nodes=st.integers(0, 20),
    ends=st.frozensets(st.integers(0, 3), max_size=2),
)
def test_grafts_keep_within_their_limits(
    tree: DraftTree, before: list[int], num_levels: int, num_nodes: int, ends: frozenset[int]
) -> None:
    drafted = list(zip(tree.token_ids, tree.parents, strict=True))
    graft(tree, [*before, tree.token_ids[0]], Lookup(ends), num_levels=num_levels, num_nodes=num_nodes)
    assert list(zip(tree.token_ids, tree.parents, strict=True))[: len(drafted)] == drafted
    assert len(tree) - len(drafted) <= num_nodes
    for node in range(len(drafted), len(tree)):
        parent = tree.parents[node]
        assert tree.depths[node] <= num_levels
        assert parent == 0 or tree.token_ids[parent] not in ends
        assert tree.child(parent, tree.token_ids[node]) == node


@given(sequence=st.lists(st.integers(0, 2), min_size=1, max_size=30), drafted=st.lists(st.integers(0, 2), max_size=4))
def test_a_path_with_grafts_ends_as_the_text_went_on_before(sequence: list[int], drafted: list[int]) -> None:
    tree = line_of(sequence[-1], *drafted)
    for parent, token_id in graft(tree, sequence, num_nodes=9):
        text = sequence + tree.drafted_ids(parent)
        # Some pair of tokens was followed by that one in the text, or in the copy where it went on with itself.
        assert any(text[i : i + 3] == [*text[-2:], token_id] for i in range(len(text) - 2))
