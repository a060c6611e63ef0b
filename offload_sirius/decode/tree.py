"""The tokens of a window as a tree: a root, drafted tokens level by level below it, and what was grafted upon them. A line is
the tree of width 1.

Pure data: knows no model and no probabilities, only where tokens stand and which of them see each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from offload_sirius.model.transformer import TokenTree


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """A drafted token behind a node."""

    parent: int
    """The node."""
    token_id: int
    score: float
    """Log-probability of the path from the root to this token, by the draft."""


class DraftTree:
    """Nodes are numbered from the root, 0: drafted ones level by level, then grafted ones. Every node comes behind its parent."""

    def __init__(self, root_id: int) -> None:
        """root_id: the last token of the answer so far, which no pass has computed yet."""
        self.token_ids = [root_id]
        self.parents = [-1]
        self.depths = [0]
        self.scores = [0.0]
        self.last_level = range(1)
        """The deepest nodes that were drafted."""
        self._children: list[dict[int, int]] = [{}]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_levels(self) -> int:
        """Drafted levels below the root: each was a draft step."""
        return self.depths[self.last_level.start]

    @property
    def num_drafted(self) -> int:
        """Nodes that were not grafted, the root included: the first ones."""
        return self.last_level.stop

    @property
    def is_line(self) -> bool:
        """Whether no two nodes have the same depth."""
        return len(self) == max(self.depths) + 1

    def grow(self, level: Sequence[Branch]) -> None:
        """Add the next level of the draft: branches behind nodes of the last one, no two of them the same."""
        assert self.num_drafted == len(self), "nothing is drafted behind what was grafted"
        first = len(self)
        for branch in level:
            assert branch.parent in self.last_level, (branch, self.last_level)
            self._add(branch)
        self.last_level = range(first, len(self))

    def graft(self, parent: int, token_id: int) -> int:
        """Add a token that was not drafted behind any node -> the node it becomes."""
        return self._add(Branch(parent=parent, token_id=token_id, score=self.scores[parent]))

    def _add(self, branch: Branch) -> int:
        node = len(self)
        assert branch.token_id not in self._children[branch.parent], branch
        self._children[branch.parent][branch.token_id] = node
        self.token_ids.append(branch.token_id)
        self.parents.append(branch.parent)
        self.depths.append(self.depths[branch.parent] + 1)
        self.scores.append(branch.score)
        self._children.append({})
        return node

    def has_children(self, node: int) -> bool:
        """Whether any token stands behind the node."""
        return bool(self._children[node])

    def child(self, node: int, token_id: int) -> int | None:
        """The node of that token behind a node; None where it was not drafted."""
        return self._children[node].get(token_id)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to the node, both included."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def drafted_ids(self, node: int) -> list[int]:
        """Tokens from behind the root to the node, which is included."""
        return [self.token_ids[each] for each in self.path(node)[1:]]

    def layout(self, nodes: Sequence[int], *, start: int, cached: Sequence[int] = (), device: torch.device) -> TokenTree:
        """Where nodes stand when they are appended to the KV cache: each sees all before the window, its ancestors and itself.

        start: length of the cache where the window begins, the root's position. cached: nodes in the slots from there on, in
        this order; the ancestors of the nodes are among them or among the nodes.
        """
        slots = [*cached, *nodes]
        columns = {node: column for column, node in enumerate(slots)}
        seen = torch.zeros(len(nodes), len(slots), dtype=torch.bool)  # [S, T - start]
        for row, node in enumerate(nodes):
            seen[row, [columns[each] for each in self.path(node)]] = True
        return TokenTree(
            positions=torch.tensor([start + self.depths[node] for node in slots]).to(device),
            mask=functional.pad(seen.to(device), (start, 0), value=True),  # -> [S, T]
        )
