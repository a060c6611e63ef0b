"""Drafts of a window: the sparse model proposes tokens, level by level, until the window is full or nothing can follow."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from offload_sirius.decode.model import Ask, Pass, Slot
from offload_sirius.decode.sampling import Sampler, no_numbers
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.steps import Event, Reply, logits_of
from offload_sirius.decode.tree import Branch, DraftTree
from offload_sirius.decode.window import WindowShape
from offload_sirius.model.transformer import TokenTree
from offload_sirius.trace import Tracer, during


class Drafter:
    """Grows trees of sparse tokens behind the last token of an answer. Their keys and values stay in the cache."""

    def __init__(
        self,
        slot: Slot,
        sampler: Sampler,
        *,
        end_token_ids: frozenset[int],
        stats: DecodeStats,
        tracer: Tracer | None,
        clock: Callable[[], float],
    ) -> None:
        self._slot = slot
        self._sampler = sampler
        self._end_token_ids = end_token_ids
        self._stats = stats
        self._tracer = tracer
        self._clock = clock

    def draft(self, sequence: Sequence[int], shape: WindowShape) -> Generator[Event, Reply, DraftTree]:
        """A tree below the last token of the sequence, which has no keys and values yet.

        It has fewer levels than the shape where all branches end. Raises WeightReadError where logits are no numbers.
        """
        assert self._slot.length == len(sequence) - 1, (self._slot.length, len(sequence))
        tree, cached = DraftTree(sequence[-1]), list[int]()
        for level in range(1, shape.num_levels + 1):
            leaves = [node for node in tree.last_level if node == 0 or tree.token_ids[node] not in self._end_token_ids]
            if not leaves:
                break
            following: Pass = "draft" if level < shape.num_levels else "correction"
            began = self._clock()
            logits = yield from logits_of(self._step(tree, leaves, cached, following))
            self._stats.num_passes["draft"] += 1
            with during(self._tracer, "sample", "choose drafted tokens"):
                tree.grow(self._branches(tree, leaves, logits, sequence, shape.width))
            self._stats.draft_seconds.append(self._clock() - began)
            cached += leaves
            del logits  # not needed any more while the next ones are computed
        return tree

    def _step(self, tree: DraftTree, leaves: list[int], cached: list[int], following: Pass) -> Ask:
        """One sparse pass over the leaves. cached: nodes that passes before have computed."""
        layout: TokenTree | None = None
        if not tree.is_line:
            start = self._slot.length - len(cached)
            layout = tree.layout(leaves, start=start, cached=cached, device=self._slot.device)
        token_ids = [tree.token_ids[node] for node in leaves]
        return Ask(slot=self._slot, kind="draft", token_ids=token_ids, tree=layout, following=following)

    def _branches(self, tree: DraftTree, leaves: list[int], logits: Tensor, sequence: Sequence[int], width: int) -> list[Branch]:
        """The next level: of a line what the sampler draws from the sparse logits, of a tree what is likeliest.

        Full mode draws at the same position with the same random number, so both agree far more often than two draws would.
        """
        befores = [[*sequence, *tree.drafted_ids(leaf)] for leaf in leaves]
        if width == 1:
            token_id = self._sampler.choose(logits[0], len(befores[0]), befores[0])
            return [Branch(parent=leaves[0], token_id=token_id, score=0.0)]
        proposals = best_tokens(self._sampler.log_probabilities(logits, befores), width, position=len(befores[0]))
        return beam({leaf: tree.scores[leaf] for leaf in leaves}, proposals, width)


def best_tokens(scores: Tensor, width: int, *, position: int) -> list[list[tuple[float, int]]]:
    """For each row of scores [S, V] its `width` best tokens as (score, token id), best first, of equals the lower id.

    Fewer where no more are possible, that is above minus infinity. Raises WeightReadError where a row has none; position: for its
    message. Waits for the device.
    """
    # topk may pick any of equals, so it only says how good one has to be.
    least = scores.topk(min(width, scores.shape[1]), dim=1).values[:, -1:]  # [S, 1]
    rows, token_ids = ((scores >= least) & (scores > -torch.inf)).nonzero(as_tuple=True)
    read = torch.stack((rows.double(), scores[rows, token_ids].double(), token_ids.double()), dim=1).tolist()
    proposals: list[list[tuple[float, int]]] = [[] for _ in scores]
    for row, score, token_id in read:
        proposals[int(row)].append((score, int(token_id)))
    if not all(proposals):
        raise no_numbers(position)
    return [sorted(each, key=lambda one: (-one[0], one[1]))[:width] for each in proposals]


def beam(leaves: dict[int, float], proposals: Sequence[Sequence[tuple[float, int]]], width: int) -> list[Branch]:
    """The best `width` of all proposals, by the log-probability of the whole path; of equals the lower parent, then the lower id.

    leaves: score of each node that proposes, in the order of the proposals.
    """
    branches = [
        Branch(parent=leaf, token_id=token_id, score=leaf_score + score)
        for (leaf, leaf_score), proposed in zip(leaves.items(), proposals, strict=True)
        for score, token_id in proposed
    ]
    return sorted(branches, key=lambda each: (-each.score, each.parent, each.token_id))[:width]
