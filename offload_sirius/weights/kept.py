"""The neurons that a sparse step keeps of each layer, for as long as a sequence lasts, gathered in host memory.

A step then brings the kept neurons of a layer in one copy, wherever the layer itself lives. Of a layer in host memory that has no
such place, the link gathers them anew in every step; of a layer on disk, whose down projection has no neuron in one piece, all of
it is read. Knows no statistics: which neurons are kept is somebody else's choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer, kept_neurons
from offload_sirius.weights.host import as_tensor
from offload_sirius.weights.layout import LayerLayout
from offload_sirius.weights.mapping import map_memory
from offload_sirius.weights.pinning import Pinning, PinReport, Registrar


class KeptStore:
    """Room in host memory for the kept neurons of some layers. Mapped once and never grows."""

    def __init__(
        self,
        layers: Sequence[int],
        layout: LayerLayout,
        dtype: torch.dtype,
        *,
        registrar: Registrar | None = None,
        node: int | None = None,
    ) -> None:
        """layers: those that have room here. registrar, node: as for HostStore."""
        own = {layer: layout.layer(layer) for layer in layers}
        ends = dict(zip(layers, accumulate(each.kept_host_nbytes for each in own.values()), strict=True))
        self._arena = as_tensor(map_memory(max(ends.values(), default=0), node=node))
        self._places = {
            layer: self._arena[ends[layer] - each.kept_host_nbytes :][: each.kept_nbytes] for layer, each in own.items()
        }
        self._neurons = {layer: kept_neurons(place, own[layer], dtype) for layer, place in self._places.items()}
        self._ids: dict[int, Tensor] = {}
        self._pinning = Pinning(list(self._places.values()), registrar) if registrar and layers else None

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self._arena.numel()

    def choose(self, layer: int, neuron_ids: Tensor, source: LayerBuffer) -> None:
        """Keep these neurons, int64 [N] in host memory, sorted, from now on. source: the layer's bytes, anywhere.

        Nothing may be on its way from the layer's place.
        """
        self._ids[layer] = neuron_ids
        if layer in self._neurons:
            gather_neurons(source, neuron_ids, self._neurons[layer])

    def ids(self, layer: int) -> Tensor:
        """The layer's kept neurons, int64 [N] in host memory."""
        return self._ids[layer]

    def place(self, layer: int) -> Tensor | None:
        """The layer's kept neurons, gathered: uint8 [kept_nbytes]. None where there is no room for them."""
        return self._places.get(layer)

    def pin_report(self) -> PinReport:
        """What could be pinned; blocks until that is known."""
        if self._pinning is None:
            return PinReport(num_pinned=0, pinned_nbytes=0, pageable_nbytes=self.nbytes, reason=None)
        return self._pinning.wait()

    def close(self) -> None:
        """Unpin, and give the arena back. Nothing may be on its way to the device."""
        if self._pinning is not None:
            self._pinning.close()
            self._pinning = None
        self._places.clear()
        self._neurons.clear()
        self._arena = as_tensor(map_memory(0))


def gather_neurons(source: LayerBuffer | KeptNeurons, neuron_ids: Tensor | None, kept: KeptNeurons) -> None:
    """Gather neurons, int64 [N], of a layer into their place; None takes all, in order. On any devices."""
    for records, place in ((source.gate_records, kept.gate_records), (source.up_down, kept.up_down)):
        if neuron_ids is None:
            place.copy_(records)
        else:
            gather_rows(records, neuron_ids, place)


def gather_rows(records: Tensor, neuron_ids: Tensor, place: Tensor) -> None:
    """place [N, ...] = the given rows, int64 [N], of records [F, ...], on any devices."""
    if records.device == place.device:
        torch.index_select(records, 0, neuron_ids.to(records.device), out=place)
    else:
        place.copy_(records.index_select(0, neuron_ids.to(records.device)))
