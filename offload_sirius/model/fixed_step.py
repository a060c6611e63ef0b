"""A step of one token whose tensors all have their places beforehand: what a device can record once and carry out again.

What differs from step to step is in device memory: the embedded token, and its position. Keys and values go where the position
says, and attention looks at a fixed number of slots, of which a mask shows those up to the token's own. That number, the extent,
is one of a few, so that early steps do not look at the whole cache; a step is recorded for each of them. Nothing here reads a
number from the device. Knows neither recorders nor streams; called as it is, it computes what `Transformer.step` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.model.costs import extent_of
from offload_sirius.model.feed_forward import DenseFeedForward
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.layers import head_logits, run_layers
from offload_sirius.model.ops import added_mask, causal_mask, grouped_attention, window_mask
from offload_sirius.model.rope import RotaryTable, Rotation
from offload_sirius.model.source import WeightSource
from offload_sirius_loaders.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedRow:
    """One token, somewhere in the first slots of the cache. See Rows."""

    hidden: Tensor
    """[1, D]"""
    rotation: Rotation
    position: Tensor
    """int64 [1] on the device; also the token's slot."""
    extent: int
    masks: dict[int | None, Tensor]
    """Window -> 0 or minus infinity for each slot, [1, extent]."""
    cache: KVCache

    def attend(self, layer: int, window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See Rows. Slots behind the token hold what others left there: finite numbers, whose weight is 0."""
        self.cache.write_at(layer, self.position, keys.transpose(1, 2), values.transpose(1, 2))
        return grouped_attention(queries, *self.cache.read(layer, 0, self.extent), self.masks[window])


class FixedStep:
    """Buffers of the step, and what is computed between them. Made by `Transformer.fixed_step`."""

    def __init__(self, spec: ModelSpec, source: WeightSource, cache: KVCache, rotary: RotaryTable, slots: Tensor) -> None:
        """source: hands out the same tensors in every step, and all neurons it hands out are computed. slots: 0, 1, ..., int64
        [capacity]. Allocates what `fixed_step_nbytes` says."""
        self._spec = spec
        self._source = source
        self._cache = cache
        self._rotary = rotary
        self._slots = slots
        self._neurons = DenseFeedForward(source, spec.activation)
        self._embedded = torch.zeros(1, spec.width, dtype=cache.dtype, device=cache.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=cache.device)
        self._logits = torch.zeros(1, spec.vocab_size, device=cache.device)

    @property
    def nbytes(self) -> int:
        """Device bytes of what goes in and comes out."""
        return self._embedded.nbytes + self._position.nbytes + self._logits.nbytes

    @torch.inference_mode()
    def step(self, token_ids: Tensor, compute: Callable[[int], None] | None = None) -> Tensor:
        """Append a token, int64 [1] in host memory -> float32 [1, V], the logits after it, which the next step overwrites.

        compute: carries out `self.compute` of an extent, in a way of its own; None calls it. Raises PromptError where there is no
        room in the cache.
        """
        assert token_ids.shape == (1,), token_ids.shape
        self._cache.require_room(1)
        self._embedded.copy_(self._source.embed(token_ids))
        self._position.fill_(self._cache.length)
        (compute or self.compute)(extent_of(self._cache.length, self._cache.capacity))
        self._cache.advance(1)
        return self._logits

    @torch.inference_mode()
    def compute(self, extent: int) -> None:
        """From the embedded token and its position, below the extent, to the logits. Doing it again changes nothing."""
        row = FixedRow(
            hidden=self._embedded.clone(),  # layers add to it
            rotation=self._rotary.at(self._position),
            position=self._position,
            extent=extent,
            masks={window: self._mask(extent, window) for window in set(self._spec.layer_windows)},
            cache=self._cache,
        )
        run_layers(self._spec, self._source, [row], self._neurons)
        self._logits.copy_(head_logits(self._spec, self._source, row.hidden))

    def _mask(self, extent: int, window: int | None) -> Tensor:
        """What a layer with that window sees, [1, extent]."""
        keys = self._slots[:extent]
        seen = causal_mask(self._position, keys)
        if window is not None:
            seen &= window_mask(self._position, keys, window)
        return added_mask(seen, self._cache.dtype)
