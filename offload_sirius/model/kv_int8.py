"""Keys and values in 8 bits: half the bytes of a cache in bfloat16, a quarter of one in float32, and a few for scales.

Each key and each value of a head is a row of integers with one scale, the largest magnitude in it over 127. Rows are quantised
one by one, so that a token's are the same whichever pass has written them, and a correction leaves what mode full leaves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.kv_rows import QuantizedKVRows, quantised
from offload_sirius_loaders.spec import ModelSpec


class QuantizedKVCache(KVCache):
    """See KVCache."""

    def __init__(
        self, spec: ModelSpec, capacity: int, *, dtype: torch.dtype, device: torch.device | str = "cpu", batch: int = 1
    ) -> None:
        """dtype: what is computed in."""
        super().__init__(spec, capacity, dtype=dtype, device=device, batch=batch, stored_dtype=torch.int8)
        shape = (*self.keys.shape[:-1], 1)
        self.key_scales = torch.zeros(shape, dtype=torch.float32, device=device)  # [L, B, K, T, 1]
        self.value_scales = torch.zeros_like(self.key_scales)
        self._scales = tuple(zip(self.key_scales.unbind(), self.value_scales.unbind(), strict=True))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See KVCache."""
        return self.keys, self.values, self.key_scales, self.value_scales

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> None:
        """See KVCache."""
        num_tokens = keys.shape[2]
        for cached, scales, given in zip(self._layers[layer], self._scales[layer], (keys, values), strict=True):
            rows, scale = quantised(given)
            cached.narrow(2, start, num_tokens).copy_(rows)
            scales.narrow(2, start, num_tokens).copy_(scale)

    def write_at(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor) -> None:
        """See KVCache."""
        for cached, scales, given in zip(self._layers[layer], self._scales[layer], (keys, values), strict=True):
            rows, scale = quantised(given)
            cached.index_copy_(2, positions, rows)
            scales.index_copy_(2, positions, scale)

    def read(self, layer: int, start: int, stop: int) -> tuple[QuantizedKVRows, QuantizedKVRows]:
        """See KVCache."""
        keys, values = (
            QuantizedKVRows(cached, scales, self.dtype).narrow(start, stop - start)
            for cached, scales in zip(self._layers[layer], self._scales[layer], strict=True)
        )
        return keys, values
