"""Corrections that do not rewrite: what stands of a window keeps the keys and values that its draft has written. For measurements
of what rewriting is worth.

The correction itself is the same pass, so that its tokens see each other as the full model computes them. Only what it leaves
behind differs: the drafts' keys and values for every token that a draft step has computed, its own for the last drafted token,
which none has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from offload_sirius.engine import Engine
from offload_sirius.engine.kv_slot import KVSlot
from offload_sirius.model.kv_cache import KVCache


class DraftedSlot(KVSlot):
    """A place for an answer whose corrected positions are the drafts'. Windows must be lines."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache)
        self._drafted: list[Tensor] = []
        """What the cache held behind the positions that were kept last, [L, B, K, T, ...] each."""

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        """See KVSlot. Before a correction, which keeps what comes before its window, the window is remembered; then put back."""
        if not offsets:
            self._drafted = [each.narrow(3, length, self.length - length).clone() for each in self.cache.tensors]
            super().keep(length)
            return
        assert tuple(offsets) == tuple(range(len(offsets))), offsets
        self._corrected = False  # what follows is not the full model's: no later prompt may begin with it
        super().keep(length, offsets)
        for cached, drafted in zip(self.cache.tensors, self._drafted, strict=True):
            num_drafted = min(len(offsets), drafted.shape[3])
            cached.narrow(3, length, num_drafted).copy_(drafted.narrow(3, 0, num_drafted))


@contextmanager
def keeping_drafted(engine: Engine) -> Iterator[None]:
    """Answers that are written meanwhile, one by one, keep their drafts' keys and values. Earlier ones are forgotten."""
    with engine.answering(engine) as streamed:
        streamed.forget()
        plain, streamed.slots[0] = streamed.slots[0], DraftedSlot(streamed.slots[0].cache)
        try:
            yield
        finally:
            streamed.slots[0] = plain
            streamed.forget()
