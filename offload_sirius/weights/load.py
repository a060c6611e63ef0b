"""Everything that is read before the first token: residents, host layers, head, norm, embedding. In parallel, with progress.

Only the way in differs by device: host memory is read into directly; a device with memory of its own is filled through two
pinned host buffers of a layer's size, one being read into while the other is uploaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import layer_jobs
from offload_sirius.weights.device import DeviceStore
from offload_sirius.weights.disk import Fill, ReaderPool, tensor_jobs
from offload_sirius.weights.host import HostStore, allocate_bytes
from offload_sirius.weights.layout import PARTS
from offload_sirius.weights.pieces import head_role
from offload_sirius_loaders.checkpoint import Checkpoint, TensorInfo
from offload_sirius_loaders.spec import Role

OnBytes = Callable[[int], None]


class Loader:
    """Fills host and device stores from a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, readers: ReaderPool, on_bytes: OnBytes) -> None:
        """on_bytes: called with the bytes of each piece that has been read, by the reader threads."""
        self._checkpoint = checkpoint
        self._readers = readers
        self._on_bytes = on_bytes

    def load_host_layers(self, store: HostStore, layers: Iterable[int]) -> None:
        """Fill the arena."""
        self._fill_layers((layer, store.layer(layer)) for layer in layers)

    def load_device(self, device: DeviceStore, staging: list[LayerBuffer]) -> None:
        """Fill head, final norm and residents. staging: host buffers to pass through; none where the device is the host."""
        self.load_tensor(None, "final_norm", device.final_norm)
        self.load_tensor(None, head_role(self._checkpoint), device.head)
        if staging:
            self._upload_layers(device.residents, staging)
        else:
            self._fill_layers(device.residents.items())

    def load_tensor(self, layer: int | None, role: Role, place: Tensor) -> None:
        """Fill one tensor; one on a device is read into host memory first."""
        info = self.info(layer, role)
        if place.device.type == "cpu":
            self._readers.submit(tensor_jobs(info, place), self._on_bytes).wait()
            return
        host = torch.empty(place.shape, dtype=place.dtype)
        self._readers.submit(tensor_jobs(info, host), self._on_bytes).wait()
        place.copy_(host)

    def info(self, layer: int | None, role: Role) -> TensorInfo:
        """Where a tensor is stored."""
        return self._checkpoint.tensors[layer, role]

    def load_embedding(self, dtype: torch.dtype) -> Tensor:
        """The embedding table in host memory, [V, D]."""
        spec = self._checkpoint.spec
        nbytes = spec.vocab_size * spec.width * dtype.itemsize
        table = allocate_bytes(nbytes, torch.device("cpu"), "host").view(dtype).view(spec.vocab_size, spec.width)
        self.load_tensor(None, "embedding", table)
        return table

    def _fill(self, layer: int, buffer: LayerBuffer) -> list[Fill]:
        return [self._readers.submit(layer_jobs(self._checkpoint, layer, part, buffer), self._on_bytes) for part in PARTS]

    def _fill_layers(self, layers: Iterable[tuple[int, LayerBuffer]]) -> None:
        # All at once: the readers' queue never runs dry between two layers.
        for fill in [fill for layer, buffer in layers for fill in self._fill(layer, buffer)]:
            fill.wait()

    def _upload_layers(self, residents: dict[int, LayerBuffer], staging: list[LayerBuffer]) -> None:
        layers = list(residents)
        fills = {layer: self._fill(layer, buffer) for layer, buffer in zip(layers, staging, strict=False)}
        for index, layer in enumerate(layers):
            for fill in fills.pop(layer):
                fill.wait()
            buffer = staging[index % len(staging)]
            residents[layer].storage.copy_(buffer.storage)
            if (following := index + len(staging)) < len(layers):
                fills[layers[following]] = self._fill(layers[following], buffer)
