"""The tokens of a window as a tree: a root, and drafted tokens level by level below it. A line is the tree of width 1.

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
    """Nodes are numbered from the root, 0, level by level; so every node comes behind its parent."""

    def __init__(self, root_id: int) -> None:
        """root_id: the last token of the answer so far, which no pass has computed yet."""
        self.token_ids = [root_id]
        self.parents = [-1]
        self.depths = [0]
        self.scores = [0.0]
        self.last_level = range(1)
        """The deepest nodes."""
        self._children: list[dict[int, int]] = [{}]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_levels(self) -> int:
        """Levels below the root."""
        return self.depths[-1]

    @property
    def is_line(self) -> bool:
        """Whether no two nodes have the same depth."""
        return len(self) == self.num_levels + 1

    def grow(self, level: Sequence[Branch]) -> None:
        """Add the next level: branches behind nodes of the last one, no two of them the same."""
        first, depth = len(self), self.num_levels + 1
        for branch in level:
            assert branch.parent in self.last_level, (branch, self.last_level)
            assert branch.token_id not in self._children[branch.parent], branch
            self._children[branch.parent][branch.token_id] = len(self)
            self.token_ids.append(branch.token_id)
            self.parents.append(branch.parent)
            self.depths.append(depth)
            self.scores.append(branch.score)
            self._children.append({})
        self.last_level = range(first, len(self))

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
