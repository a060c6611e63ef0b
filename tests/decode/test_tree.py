"""Trees of drafted tokens: who stands where and sees whom, against the definition on random trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.decode.tree import Branch, DraftTree
from offload_sirius.model.transformer import TokenTree

from .trees import grafted_trees, trees

CPU = torch.device("cpu")


def tree_of(*levels: Sequence[tuple[int, int]], root: int = 0) -> DraftTree:
    """Levels of (parent, token id)."""
    tree = DraftTree(root)
    for level in levels:
        tree.grow([Branch(parent=parent, token_id=token_id, score=-1.0) for parent, token_id in level])
    return tree


def descends(tree: DraftTree, node: int, ancestor: int) -> bool:
    """The definition."""
    return node == ancestor or (node > 0 and descends(tree, tree.parents[node], ancestor))


def rows(layout: TokenTree) -> list[list[int]]:
    return layout.mask.int().tolist()


def test_a_tree_of_two_branches_written_out() -> None:
    tree = tree_of([(0, 5), (0, 6)], [(2, 7), (1, 8), (2, 8)], root=4)
    assert (tree.token_ids, tree.depths) == ([4, 5, 6, 7, 8, 8], [0, 1, 1, 2, 2, 2])
    assert (tree.num_levels, tree.last_level, tree.is_line) == (2, range(3, 6), False)
    assert (tree.child(0, 6), tree.child(1, 7), tree.child(2, 8)) == (2, None, 5)
    assert (tree.path(5), tree.drafted_ids(5), tree.drafted_ids(0)) == ([0, 2, 5], [6, 8], [])
    layout = tree.layout(range(6), start=2, device=CPU)
    assert layout.positions.tolist() == [2, 3, 3, 4, 4, 4]
    assert rows(layout) == [
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 1, 0, 0],
        [1, 1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 1, 0, 0, 1],
    ]


def test_nodes_that_were_not_stepped_over_have_no_slot() -> None:
    tree = tree_of([(0, 5), (0, 6)], [(2, 7), (2, 8)])
    layout = tree.layout([3, 4], start=1, cached=[0, 2], device=CPU)
    assert layout.positions.tolist() == [1, 2, 3, 3]
    assert rows(layout) == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]


def test_what_is_grafted_stands_at_any_depth_and_is_no_level_of_the_draft() -> None:
    tree = tree_of([(0, 5)], [(1, 6)], root=4)
    assert (tree.graft(0, 7), tree.graft(3, 8), tree.graft(2, 9)) == (3, 4, 5)
    assert (tree.token_ids, tree.parents, tree.depths) == ([4, 5, 6, 7, 8, 9], [-1, 0, 1, 0, 3, 2], [0, 1, 2, 1, 2, 3])
    assert (tree.num_drafted, tree.num_levels, tree.last_level, tree.is_line) == (3, 2, range(2, 3), False)
    assert (tree.child(0, 7), tree.child(3, 8), tree.path(5), tree.drafted_ids(4)) == (3, 4, [0, 1, 2, 5], [7, 8])
    layout = tree.layout(range(6), start=0, device=CPU)
    assert layout.positions.tolist() == [0, 1, 2, 1, 2, 3]
    assert rows(layout) == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]


def test_what_is_grafted_behind_the_end_of_a_line_makes_it_longer() -> None:
    tree = tree_of([(0, 5)])
    tree.graft(1, 6)
    assert (tree.is_line, tree.num_levels, len(tree)) == (True, 1, 3)


def test_scores_are_kept() -> None:
    tree = DraftTree(1)
    tree.grow([Branch(parent=0, token_id=2, score=-0.5), Branch(parent=0, token_id=3, score=-2.0)])
    assert tree.scores == [0.0, -0.5, -2.0]


@given(tree=grafted_trees(), start=st.integers(0, 5))
def test_a_node_sees_all_before_the_window_its_ancestors_and_itself(tree: DraftTree, start: int) -> None:
    layout = tree.layout(range(len(tree)), start=start, device=CPU)
    assert layout.positions.tolist() == [start + depth for depth in tree.depths]
    assert rows(layout) == [
        [1] * start + [int(descends(tree, node, other)) for other in range(len(tree))] for node in range(len(tree))
    ]


@given(tree=trees(), start=st.integers(0, 5))
def test_level_by_level_nodes_see_the_same_as_all_at_once(tree: DraftTree, start: int) -> None:
    whole = rows(tree.layout(range(len(tree)), start=start, device=CPU))
    level = list(tree.last_level)
    before = list(range(level[0]))
    assert rows(tree.layout(level, start=start, cached=before, device=CPU)) == [whole[node] for node in level]


@given(tree=grafted_trees())
def test_a_path_leads_from_the_root_over_children(tree: DraftTree) -> None:
    for node in range(len(tree)):
        at = 0
        for token_id in tree.drafted_ids(node):
            child = tree.child(at, token_id)
            assert child is not None
            assert tree.parents[child] == at
            at = child
        assert at == node
        assert tree.path(node) == [other for other in range(len(tree)) if descends(tree, node, other)]


@given(tree=grafted_trees())
def test_a_line_has_one_node_on_each_level(tree: DraftTree) -> None:
    assert tree.is_line == (len(set(tree.depths)) == len(tree))
