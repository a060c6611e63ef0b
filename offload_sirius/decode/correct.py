"""Correction of a window: one full pass over its tokens, which makes their keys and values the full model's, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import torch
from torch import Tensor

from offload_sirius.config import DecodingConfig
from offload_sirius.decode.accept import Acceptance, AcceptanceRule, accept_exact, accept_threshold, near_ties
from offload_sirius.decode.emitted import Emitted
from offload_sirius.decode.logprobs import emitted
from offload_sirius.decode.model import Ask, Pass, Slot
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.steps import Event, Reply, logits_of
from offload_sirius.decode.tree import DraftTree
from offload_sirius.trace import Tracer, during


class Corrector:
    """Has the full model judge trees, and leaves in the cache what stands."""

    def __init__(
        self,
        slot: Slot,
        sampler: Sampler,
        *,
        decoding: DecodingConfig,
        end_token_ids: frozenset[int],
        stats: DecodeStats,
        tracer: Tracer | None,
        clock: Callable[[], float],
        eps: float | None,
        rule: AcceptanceRule | None = None,
        num_alternatives: int | None = None,
    ) -> None:
        """eps: of the compute dtype, to count near ties by; None does not count them. Counted are greedy exact tokens only.

        rule: decides what stands, whatever the settings say; near ties are not counted then. num_alternatives: see `emitted`.
        """
        self._slot = slot
        self._sampler = sampler
        self._decoding = decoding
        self._end_token_ids = end_token_ids
        self._stats = stats
        self._tracer = tracer
        self._clock = clock
        self._rule = rule
        self._num_alternatives = num_alternatives
        self._eps = eps if rule is None and sampler.is_greedy and decoding.accept == "exact" else None
        if self._eps is not None:
            stats.count_flips(0)

    def correct(
        self, tree: DraftTree, sequence: Sequence[int], *, following: Pass
    ) -> Generator[Event, Reply, tuple[Acceptance, list[Emitted]]]:
        """What stands of a tree that was drafted below the last token of the sequence, and the tokens as they are emitted.

        The cache then holds all tokens but the last emitted one. Raises WeightReadError where logits that count are no numbers.
        """
        began, start = self._clock(), len(sequence) - 1
        # What the draft has put there is sparse: the full model's keys and values take its place.
        self._slot.keep(start)
        logits = yield from logits_of(
            Ask(
                slot=self._slot,
                kind="correction",
                token_ids=tree.token_ids,
                tree=None if tree.is_line else tree.layout(range(len(tree)), start=start, device=self._slot.device),
                following=following,
                num_grafted=len(tree) - tree.num_drafted,
            )
        )
        self._stats.num_passes["correction"] += 1
        with during(self._tracer, "sample", "accept drafted tokens"):
            acceptance = self._accept(tree, logits, sequence)
        self._slot.keep(start, acceptance.nodes)
        self._stats.correction_seconds.append(self._clock() - began)
        rows = zip(acceptance.nodes, acceptance.token_ids, strict=True)
        return acceptance, [emitted(token_id, logits[node], self._num_alternatives) for node, token_id in rows]

    def _accept(self, tree: DraftTree, logits: Tensor, sequence: Sequence[int]) -> Acceptance:
        if self._rule is not None:
            return self._rule(tree, logits, self._sampler, sequence, self._end_token_ids)
        if self._decoding.accept == "threshold":
            threshold = self._decoding.threshold
            return accept_threshold(tree, logits, self._sampler, sequence, self._end_token_ids, threshold)
        acceptance = accept_exact(tree, logits, self._sampler, sequence, self._end_token_ids)
        if self._eps is not None:
            self._stats.count_flips(near_ties(self._decisive(logits, acceptance, sequence), self._eps))
        return acceptance

    def _decisive(self, logits: Tensor, acceptance: Acceptance, sequence: Sequence[int]) -> Tensor:
        """Of the scores from which each emitted token was chosen the two largest, [emitted, 2]: whole rows would be another copy
        of all logits."""
        befores = [[*sequence, *acceptance.token_ids[:count]] for count in range(len(acceptance.nodes))]
        rows = zip(acceptance.nodes, befores, strict=True)
        count = min(2, logits.shape[1])
        return torch.stack([self._sampler.penalised(logits[node], before).topk(count).values for node, before in rows])
