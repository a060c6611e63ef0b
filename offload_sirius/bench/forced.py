"""Acceptance by a script, so that the time of a given one can be measured: every pass is run, and its verdict passed over."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor

from offload_sirius.bench.variants import forced_tokens
from offload_sirius.decode.accept import Acceptance, accept_exact
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.tree import DraftTree


class ForcedAcceptance:
    """An AcceptanceRule: window i of an answer gives floor((i + 1) * aal) - floor(i * aal) tokens, whatever the models say."""

    def __init__(self, aal: Fraction) -> None:
        """aal: average advancement length to force, from 1 to the window. For one answer; trees must be lines."""
        self._aal = aal
        self._num_windows = 0

    def __call__(
        self, tree: DraftTree, logits: Tensor, sampler: Sampler, sequence: Sequence[int], end_token_ids: frozenset[int]
    ) -> Acceptance:
        """See AcceptanceRule."""
        assert tree.is_line
        # The walk that would have decided is a part of the time.
        accept_exact(tree, logits, sampler, sequence, end_token_ids)
        num_accepted = min(self._advance() - 1, tree.num_levels)
        drafted = tree.token_ids[1 : num_accepted + 1]
        before = [*sequence, *drafted]
        return Acceptance(
            token_ids=(*drafted, sampler.choose(logits[num_accepted], len(before), before)),
            nodes=tuple(range(num_accepted + 1)),
            num_drafted=num_accepted,
            num_accepted=num_accepted,
            num_tried=min(num_accepted + 1, tree.num_levels),
        )

    def _advance(self) -> int:
        done = forced_tokens(self._aal, self._num_windows)
        self._num_windows += 1
        return forced_tokens(self._aal, self._num_windows) - done
