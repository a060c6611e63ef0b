"""Random trees: drafted ones, and those upon which something was grafted. Tokens are 0 to 3, the root's 0 to 9."""

from __future__ import annotations

from hypothesis import strategies as st

from offload_sirius.decode.tree import Branch, DraftTree


@st.composite
def trees(draw: st.DrawFn) -> DraftTree:
    tree = DraftTree(draw(st.integers(0, 9)))
    for _ in range(draw(st.integers(0, 5))):
        places = st.tuples(st.sampled_from(tree.last_level), st.integers(0, 3))
        level = draw(st.lists(places, min_size=1, max_size=4, unique=True))
        tree.grow([Branch(parent=parent, token_id=token_id, score=0.0) for parent, token_id in level])
    return tree


@st.composite
def grafted_trees(draw: st.DrawFn) -> DraftTree:
    """Such trees, and up to five tokens more behind any of their nodes."""
    tree = draw(trees())
    for _ in range(draw(st.integers(0, 5))):
        parent, token_id = draw(st.integers(0, len(tree) - 1)), draw(st.integers(0, 3))
        if tree.child(parent, token_id) is None:
            assert tree.graft(parent, token_id) == len(tree) - 1
    return tree
