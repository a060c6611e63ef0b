"""Streamed layers in host memory: one arena of exactly their size, pinned where the device has memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from offload_sirius.errors import BudgetError
from offload_sirius.units import format_size
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.layout import LayerLayout
from offload_sirius.weights.mapping import map_memory
from offload_sirius.weights.pinning import Pinning, PinReport, Registrar
from offload_sirius_loaders.spec import ModelSpec


class HostStore:
    """Layers in host memory. The arena is mapped once and never grows."""

    def __init__(
        self,
        layers: Sequence[int],
        spec: ModelSpec,
        layout: LayerLayout,
        dtype: torch.dtype,
        *,
        registrar: Registrar | None = None,
        node: int | None = None,
        num_buffers: int | None = None,
        of_any_layer: bool = False,
    ) -> None:
        """Map room for the layers and begin to pin it; they are filled by who loads them.

        registrar: pins, None where the device reads host memory anyway. node: NUMA node of the device. num_buffers: let the
        layers share that many buffers (timing of shapes that exceed memory; their weights are then not their own).
        of_any_layer: each buffer has room for any layer, whatever passes through it.
        """
        count = len(layers) if num_buffers is None else min(num_buffers, len(layers))
        own = [layout if of_any_layer else layout.layer(layer) for layer in layers[:count]]
        ends = list(accumulate(each.host_nbytes for each in own))
        self._arena = as_tensor(map_memory(ends[-1] if ends else 0, node=node))
        self._distinct = [
            LayerBuffer(self._arena[end - each.host_nbytes :][: each.nbytes], spec, each, dtype)
            for end, each in zip(ends, own, strict=True)
        ]
        self._index_of = {layer: index % count for index, layer in enumerate(layers)}
        self._pinning = Pinning([buffer.storage for buffer in self._distinct], registrar) if registrar and layers else None

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self._arena.numel()

    @property
    def buffers(self) -> list[LayerBuffer]:
        """All of them, in the order in which they were asked for."""
        return list(self._distinct)

    def layer(self, layer: int) -> LayerBuffer:
        """The layer's bytes and views."""
        return self._distinct[self._index_of[layer]]

    def pin_report(self) -> PinReport:
        """What could be pinned; blocks until that is known."""
        if self._pinning is None:
            return PinReport(num_pinned=0, pinned_nbytes=0, pageable_nbytes=self.nbytes, reason=None)
        return self._pinning.wait()

    def is_pinned(self, layer: int) -> bool:
        """Whether the device can read the layer directly; blocks until that is known."""
        return self._index_of[layer] < self.pin_report().num_pinned

    def close(self) -> None:
        """Unpin, and give the arena back. Nothing may be on its way to the device."""
        if self._pinning is not None:
            self._pinning.close()
            self._pinning = None
        self._distinct.clear()
        self._arena = as_tensor(map_memory(0))


def as_tensor(view: memoryview) -> Tensor:
    """Mapped memory as uint8 [n]."""
    return torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)


def allocate_bytes(nbytes: int, device: torch.device, where: str) -> Tensor:
    """A flat buffer, uint8 [nbytes], starting at a cache line. Raises BudgetError that names the place when memory runs out."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        raise BudgetError(
            f"{where} memory ran out while allocating {format_size(nbytes)}; give a smaller --{where}-memory"
        ) from error
