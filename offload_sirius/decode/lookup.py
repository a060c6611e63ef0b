"""Prompt lookup: tokens that followed the same n-gram before, in prompt or answer, are grafted upon what was drafted.

They take no draft step and no byte of the link, only rows of the correction, which verifies them like all others. Where rows cost
time, each has to be worth it: it is weighed by the tokens that it may be expected to give. Knows no model and no clock.

The idea is that of prompt lookup decoding (https://github.com/apoorvumang/prompt-lookup-decoding); here it widens a tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from offload_sirius.decode.accept import Acceptance
from offload_sirius.decode.ngrams import LENGTHS, Ngrams
from offload_sirius.decode.tree import DraftTree

PRIOR_STOOD, PRIOR_TRIED = 0.75, 1.0
"""As if so many tokens that were looked up had stood of so many, for each length of match."""
DECAY = 0.98
"""What a window counts for when one more has come: about the last fifty decide. What did not pay is forgotten and tried again.

Tokens that never stand are tried at most (1 - DECAY) * PRIOR_STOOD / price times a window, for each length of match: whatever the
price is, that costs (1 - DECAY) * PRIOR_STOOD = 0.015 tokens a window.
"""


@dataclass(order=True, frozen=True, slots=True)
class _Proposal:
    """A token that may be grafted. The least is the most promising one: longer matches before shorter ones, then nodes that were
    there first."""

    negative_worth: float
    """Expected tokens that it gives, negated."""
    negative_length: int
    """Of its match, negated."""
    parent: int
    place: int
    """Its index in the text and the path behind it."""


class Lookup:
    """Grafts, and learns from corrections what that gives."""

    def __init__(self, end_token_ids: frozenset[int]) -> None:
        self._end_token_ids = end_token_ids
        self._ngrams = Ngrams()
        self._lengths: dict[int, int] = {}
        """Nodes grafted last -> length of the match."""
        self._stood = dict.fromkeys(LENGTHS, PRIOR_STOOD)
        self._tried = dict.fromkeys(LENGTHS, PRIOR_TRIED)

    def hit_share(self, length: int) -> float:
        """Expected share of tokens, looked up by a match of that length, that stand where all before them do and the draft does
        not."""
        return self._stood[length] / self._tried[length]

    def graft(
        self, tree: DraftTree, sequence: Sequence[int], *, num_levels: int, num_nodes: int, acceptance: float, price: float
    ) -> None:
        """Add to a tree that was drafted below the last token of the sequence.

        num_levels: below the root at most. num_nodes: to be added at most. acceptance: expected share of drafted levels that
        stand, each given that the one before does. price: tokens that a node must promise.
        """
        self._ngrams.extend(sequence[len(self._ngrams) :])
        self._lengths = {}
        queue = self._proposals(tree, acceptance)
        while queue and len(self._lengths) < num_nodes and -queue[0].negative_worth > price:
            best = heapq.heappop(queue)
            token_id = self._token_id(tree, best)
            if tree.depths[best.parent] >= num_levels or tree.child(best.parent, token_id) is not None:
                continue  # Drafted: behind that token is a proposal of its own.
            node, length = tree.graft(best.parent, token_id), -best.negative_length
            self._lengths[node] = length
            if token_id not in self._end_token_ids:
                # Were it right, so many tokens and that one would match.
                longer = min(length + 1, LENGTHS[0])
                worth = -best.negative_worth * self.hit_share(longer)
                heapq.heappush(queue, _Proposal(-worth, -longer, node, best.place + 1))

    def learn(self, tree: DraftTree, acceptance: Acceptance) -> None:
        """What became of the tree."""
        for counts, prior in ((self._stood, PRIOR_STOOD), (self._tried, PRIOR_TRIED)):
            for length in LENGTHS:
                counts[length] = prior + (counts[length] - prior) * DECAY
        following = dict(zip(acceptance.nodes, [*acceptance.nodes[1:], None], strict=True))
        for node, length in self._lengths.items():
            parent = tree.parents[node]
            stands = following.get(parent)
            # Tried is what hangs on the path, but for where a drafted token stood.
            if parent in following and (stands is None or stands >= tree.num_drafted):
                self._tried[length] += 1
                self._stood[length] += stands == node

    def _proposals(self, tree: DraftTree, acceptance: float) -> list[_Proposal]:
        """What follows each node that was drafted, as a heap."""
        proposals = []
        for node in range(tree.num_drafted):
            match = self._ngrams.find(self._last_ids(tree, node))
            if match is None or (node > 0 and tree.token_ids[node] in self._end_token_ids):
                continue
            reached = acceptance ** tree.depths[node]
            # What is grafted beside a draft counts only where that is wrong.
            free = 1 - acceptance if tree.has_children(node) else 1.0
            worth = reached * free * self.hit_share(match.length)
            proposals.append(_Proposal(-worth, -match.length, node, match.place))
        heapq.heapify(proposals)
        return proposals

    def _last_ids(self, tree: DraftTree, node: int) -> list[int]:
        """The tokens up to a node, no more than the longest n-gram has."""
        drafted = tree.drafted_ids(node)[-LENGTHS[0] :]
        return [*self._ngrams.token_ids[len(drafted) - LENGTHS[0] :], *drafted] if len(drafted) < LENGTHS[0] else drafted

    def _token_id(self, tree: DraftTree, proposal: _Proposal) -> int:
        """What stands at the proposal's place: a copy that comes to the end of the text goes on with itself."""
        token_ids = self._ngrams.token_ids
        if proposal.place < len(token_ids):
            return token_ids[proposal.place]
        return tree.drafted_ids(proposal.parent)[proposal.place - len(token_ids)]
