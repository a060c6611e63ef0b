"""The KV cache of one answer, and the tokens that it is of: what a later prompt begins with need not be computed again.

Keys and values that a sparse pass has written are not the full model's, and those of a tree stand in no line before the branch
that is kept has been moved together: neither counts. Knows no weights and no passes but by their kind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from offload_sirius.decode.model import Pass
from offload_sirius.model.kv_cache import KVCache


class KVSlot:
    """A place for an answer. Between two answers it holds what the first has left."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._token_ids: list[int] = []
        """Of every position of the cache."""
        self._num_sure = 0
        """Positions at the beginning that hold the full model's keys and values, in a line."""
        self._corrected = False
        """Whether the last pass was a correction, of which nobody has said yet what stands."""
        self.is_busy = False
        """Whether an answer is being written here beside others."""
        self.left_at = 0.0
        """When the last of these has left, by time.perf_counter."""
        self.is_heard = False
        """Whether the statistic by which neurons are chosen rests on this text."""
        self.num_heard_before = 0
        """Tokens of the text before the answer began on which it rested."""

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self.cache.length

    @property
    def room(self) -> int:
        """Further positions that the cache has room for."""
        return self.cache.capacity - self.cache.length

    @property
    def device(self) -> torch.device:
        """Where the cache is."""
        return self.cache.device

    @property
    def token_ids(self) -> list[int]:
        """Of which it holds the full model's keys and values, from the first position on."""
        return self._token_ids[: self._num_sure]

    @property
    def num_heard(self) -> int:
        """Tokens on which the statistic of neurons rests."""
        return len(self.token_ids) if self.is_heard else 0

    def shared(self, prompt_ids: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that need not be computed: all but one at most, as its logits are wanted."""
        most = min(len(self.token_ids), len(prompt_ids) - 1)
        return next((index for index in range(most) if self._token_ids[index] != prompt_ids[index]), most)

    def begin(self, num_cached: int) -> None:
        """An answer begins, of whose prompt so many tokens are here already."""
        assert num_cached <= self._num_sure, (num_cached, self._num_sure)
        self.num_heard_before = self.num_heard
        self.keep(num_cached)

    def leave(self) -> None:
        """The answer that was written here beside others has ended."""
        self.is_busy, self.left_at = False, time.perf_counter()

    def take(self, other: KVSlot, num_tokens: int) -> None:
        """Copy the beginning of another text in place of this one."""
        assert num_tokens <= len(other.token_ids), (num_tokens, len(other.token_ids))
        self.cache.take(other.cache, num_tokens)
        self._token_ids, self._num_sure, self._corrected = other.token_ids[:num_tokens], num_tokens, False
        self.is_heard = False

    def appended(self, kind: Pass, token_ids: Sequence[int]) -> None:
        """A pass has computed so many tokens more."""
        self._token_ids += token_ids
        self._corrected = kind == "correction"
        if kind in ("prefill", "full"):
            self._num_sure = self.length

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        """Keep the first `length` positions, and behind them those at length + offset, offsets ascending; take the rest back.

        Behind a correction all that is kept is the full model's.
        """
        self.cache.keep(length, offsets)
        self._token_ids[length:] = [self._token_ids[length + offset] for offset in offsets]
        self._num_sure = self.length if self._corrected else min(self._num_sure, length)
