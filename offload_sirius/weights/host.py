"""Streamed layers in host memory: one arena of exactly their size, pinned where the device has memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_sirius.errors import BudgetError
from offload_sirius.units import format_size
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.layout import LayerLayout
from offload_sirius_loaders.spec import ModelSpec


class HostStore:
    """Layers in host memory. The arena is allocated once and never grows."""

    def __init__(self, layers: Sequence[int], spec: ModelSpec, layout: LayerLayout, dtype: torch.dtype, *, pinned: bool) -> None:
        """Allocate room for the layers; they are filled by who loads them. Raises BudgetError when memory runs out."""
        self._arena = allocate_bytes(len(layers) * layout.nbytes, torch.device("cpu"), "host")
        self._pinned = pinned and len(layers) > 0
        if self._pinned:
            pin(self._arena)
        self._buffers = {
            layer: LayerBuffer(self._arena[index * layout.nbytes : (index + 1) * layout.nbytes], spec, layout, dtype)
            for index, layer in enumerate(layers)
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self._arena.numel()

    @property
    def buffers(self) -> list[LayerBuffer]:
        """All of them, in the order in which they were asked for."""
        return list(self._buffers.values())

    def layer(self, layer: int) -> LayerBuffer:
        """The layer's bytes and views."""
        return self._buffers[layer]

    def close(self) -> None:
        """Unpin."""
        if self._pinned:
            unpin(self._arena)
            self._pinned = False


def allocate_bytes(nbytes: int, device: torch.device, where: str) -> Tensor:
    """A flat buffer, uint8 [nbytes], starting at a cache line. Raises BudgetError that names the place when memory runs out."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        raise BudgetError(
            f"{where} memory ran out while allocating {format_size(nbytes)}; give a smaller --{where}-memory"
        ) from error


def pin(buffer: Tensor) -> None:
    """Lock a host buffer in memory so that the device can read it directly.

    Registered rather than allocated through torch's pin_memory, which rounds up to a power of two.
    """
    status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.numel(), 0)
    if int(status) != 0:
        raise BudgetError(
            f"host memory: {format_size(buffer.numel())} could not be pinned (CUDA error {int(status)}); "
            "raise the limit shown by `ulimit -l`, or give a smaller --host-memory"
        )


def unpin(buffer: Tensor) -> None:
    """Undo `pin`."""
    torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
