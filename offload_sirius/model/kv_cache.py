"""Keys and values of the positions computed so far, in two tensors allocated once. Does not know how they are made or used.

All layers of a pass write the same positions, so writing does not make the cache longer: the pass does, with `advance`, when its
last layer is done. A pass that is interrupted leaves the cache as it was. `truncate` takes positions back, and `keep` all but one
branch of a tree; what stood there is overwritten by the next pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_sirius.errors import PromptError
from offload_sirius.model.kv_rows import KVRows
from offload_sirius_loaders.spec import ModelSpec


class KVCache:
    """Room for `capacity` positions of each of `batch` sequences, which all have the same length."""

    def __init__(
        self,
        spec: ModelSpec,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        batch: int = 1,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        """dtype: what is computed in, and held, unless a stored_dtype is given."""
        shape = (spec.num_layers, batch, spec.num_kv_heads, capacity, spec.head_dim)
        # Zeros, as a step of fixed extent reads slots that nobody has written: their weight is 0, and 0 times no number is none.
        self.keys = torch.zeros(shape, dtype=stored_dtype or dtype, device=device)  # [L, B, K, T, E]
        self.values = torch.zeros_like(self.keys)
        self.dtype = dtype
        """The compute dtype."""
        self.capacity = capacity
        self.length = 0
        # Taking a layer out of the big tensor costs as much as writing a token; do it once.
        self._layers = tuple(zip(self.keys.unbind(), self.values.unbind(), strict=True))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds, each [L, B, K, T, ...]."""
        return self.keys, self.values

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.keys.device

    @property
    def nbytes(self) -> int:
        """Device bytes of the cache."""
        return sum(each.nbytes for each in self.tensors)

    def require_room(self, num_tokens: int) -> None:
        """Raises PromptError if that many further positions do not fit."""
        needed = self.length + num_tokens
        if needed > self.capacity:
            raise PromptError(
                f"the context needs {needed} positions, the KV cache has room for {self.capacity}; "
                "shorten the prompt or the answer, or raise --max-context"
            )

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [B, K, S, E] at positions start, ..., start + S - 1 of the layer."""
        cached_keys, cached_values = self._layers[layer]
        num_tokens = keys.shape[2]
        cached_keys.narrow(2, start, num_tokens).copy_(keys)
        cached_values.narrow(2, start, num_tokens).copy_(values)

    def write_at(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [B, K, S, E] at these positions of the layer, int64 [S] on the device."""
        cached_keys, cached_values = self._layers[layer]
        cached_keys.index_copy_(2, positions, keys)
        cached_values.index_copy_(2, positions, values)

    def read(self, layer: int, start: int, stop: int) -> tuple[KVRows, KVRows]:
        """Keys and values of positions start, ..., stop - 1 of the layer, [B, K, stop - start, E] each: views, no copies."""
        cached_keys, cached_values = self._layers[layer]
        return cached_keys.narrow(2, start, stop - start), cached_values.narrow(2, start, stop - start)

    def advance(self, num_tokens: int) -> None:
        """Every layer has written that many positions at `length`: they count from now on."""
        assert self.length + num_tokens <= self.capacity, (self.length, num_tokens, self.capacity)
        self.length += num_tokens

    def keep(self, length: int, offsets: Sequence[int] = ()) -> None:
        """Keep the first `length` positions and behind them, moved together, those at length + offset. offsets: ascending."""
        assert length + max(offsets, default=-1) < self.length, (length, offsets, self.length)
        num_in_place = next((index for index, offset in enumerate(offsets) if offset != index), len(offsets))
        start, moved = length + num_in_place, offsets[num_in_place:]
        if moved:
            slots = torch.tensor(moved, device=self.device) + length
            for cached in self.tensors:
                # Taken out before it is put back: places may overlap.
                cached.narrow(3, start, len(moved)).copy_(cached.index_select(3, slots))
        self.length = length + len(offsets)

    def take(self, other: KVCache, length: int) -> None:
        """Hold the first `length` positions of another cache of the same shape, and nothing else."""
        assert length <= other.length, (length, other.length)
        for own, others in zip(self.tensors, other.tensors, strict=True):
            own.narrow(3, 0, length).copy_(others.narrow(3, 0, length))
        self.length = length

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length
