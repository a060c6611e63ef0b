"""Some neurons of every layer stay on the device, the others pass through slots: what is where, and how they change places.

    on the device for good   all attention blocks, and N hot neurons of each layer: a layer of N neurons, as `layout.py` has it
    slots while prefilling   all F neurons of a layer, from which the hot ones are copied
    slots after that         the F - N cold ones: as they are fewer bytes, more slots of the same memory

A draft step moves nothing. While it computes, the link fills the slots with the cold neurons that the coming correction begins
with. A neuron that becomes hot is copied out of the slot in which it passes, into the place of one that becomes cold, of which
host memory has all bytes anyway: the exchange costs no bytes of the link.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.trace import Tracer
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer
from offload_sirius.weights.copiers import Copier
from offload_sirius.weights.embedding import Embedding
from offload_sirius.weights.kept import gather_neurons
from offload_sirius.weights.layout import Cargo
from offload_sirius.weights.ring import Flight, Ring
from offload_sirius.weights.streamer import Phase, Streamer

EXCHANGED_AT_ONCE = 256
"""Neurons for which there is a copy on the device beside their two places."""

SWAPPED_AT_ONCE = EXCHANGED_AT_ONCE // 2
"""Pairs of neurons that change places at once: there is a copy of both."""


@dataclass(frozen=True)
class HotSlots:
    """The same memory, cut in two ways."""

    whole: Sequence[KeptNeurons]
    """[F] each, two or more."""
    cold: Sequence[KeptNeurons]
    """[F - N] each."""


class HotStreamer(Streamer):
    """Weights of which every layer is partly resident.

    Satisfies the model's WeightSource in passes that prefill or draft. One that needs all neurons asks for a layer's two halves.
    """

    def __init__(
        self,
        *,
        layers: Mapping[int, LayerBuffer],
        slots: HotSlots,
        copier: Copier,
        embedding: Embedding,
        final_norm: Tensor,
        head: Tensor,
        tracer: Tracer | None = None,
    ) -> None:
        """layers: each layer's attention block and room for its hot neurons. Nothing is copied before it is asked for."""
        super().__init__(copier=copier, embedding=embedding, final_norm=final_norm, head=head, tracer=tracer)
        self._layers = layers
        self._link = copier
        self._cold_ids: dict[int, Tensor] = {}
        """Copies: what is on its way was asked for by them, and whoever chose may go on with theirs."""
        slots_of: dict[Cargo, Sequence[KeptNeurons]] = {"records": slots.whole, "cold": slots.cold}
        self._ring = Ring(sorted(layers), slots_of, self._send)
        self._cargo: Cargo = "records"
        self._front: Flight[KeptNeurons] | None = None

    def begin(self, phase: Phase, cargo: Cargo, *, following: Cargo = "cold") -> None:
        """A pass begins. cargo: `records` where hot neurons are chosen, `hot` where no others are needed, `cold` where all are.

        following: as for WeightStreamer. Whatever the next pass is, the next that moves anything moves what is cold.
        """
        self._phase, self._cargo = phase, cargo
        if cargo == "hot":
            self._ring.begin("cold", "cold")
            self._ring.fill()  # the link works while the draft computes
        else:
            self._ring.begin(cargo, "cold")

    def attention(self, layer: int) -> LayerBuffer:
        """The layer's attention block, which is there."""
        if self._cargo != "hot":
            self._front = self._ring.front(layer)
        self._computing(layer, "attention")
        return self._layers[layer]

    def neurons(self, layer: int) -> LayerBuffer | KeptNeurons:
        """In a pass that chooses, all neurons of the layer, once they are there; else the hot ones."""
        self._computed()
        neurons = self._layers[layer] if self._cargo != "records" else self._arrived(layer)
        self._computing(layer, "neurons")
        return neurons

    def cold_neurons(self, layer: int) -> KeptNeurons:
        """The others, once they are there: neuron i is the one that `choose` or `exchange` was told of as the i-th cold one."""
        assert self._cargo == "cold", self._cargo
        self._computed()
        cold = self._arrived(layer)
        self._computing(layer, "cold neurons")
        return cold

    def choose(self, layer: int, hot_ids: Tensor, cold_ids: Tensor) -> None:
        """From now on these neurons of the layer that passes are hot, int64 [N], and these cold, int64 [F - N]; on the device."""
        gather_neurons(self._arrived(layer), hot_ids, self._hot(layer))
        self._cold_ids[layer] = cold_ids.to("cpu", copy=True)

    def exchange(self, layer: int, hot_places: Tensor, cold_places: Tensor, cold_ids: Tensor) -> None:
        """Copy cold neurons of the layer that passes into places of hot ones, int64 [k] each.

        cold_ids: those that are cold then, int64 [F - N], in the order in which they shall arrive from now on. All on the device.
        """
        hot, cold = self._hot(layer), self._arrived(layer)
        # A piece at a time: a prompt that was unlike its answer may have half of a layer change places.
        for to, source in zip(hot_places.split(EXCHANGED_AT_ONCE), cold_places.split(EXCHANGED_AT_ONCE), strict=True):
            hot.gate.index_copy_(0, to, cold.gate.index_select(0, source))
            hot.up_down.index_copy_(0, to, cold.up_down.index_select(0, source))
        self._cold_ids[layer] = cold_ids.to("cpu", copy=True)

    def swap(self, layer: int, places: Tensor, other_places: Tensor) -> None:
        """Have hot neurons of the layer in some places and in others, int64 [k] each, on the device, change places."""
        hot = self._hot(layer)
        # Copies of both: half as many at a time.
        for some, others in zip(places.split(SWAPPED_AT_ONCE), other_places.split(SWAPPED_AT_ONCE), strict=True):
            to, source = torch.cat((some, others)), torch.cat((others, some))
            hot.gate.index_copy_(0, to, hot.gate.index_select(0, source))
            hot.up_down.index_copy_(0, to, hot.up_down.index_select(0, source))

    def release(self, layer: int) -> None:
        """The layer has been computed on: its slot goes to the next one that is not under way."""
        self._computed()
        if self._cargo != "hot":
            self.pass_nbytes[self._phase] += self._ring.advance().nbytes

    @property
    def discarded_nbytes(self) -> int:
        """Bytes that were fetched for a pass that did not come."""
        return self._ring.discarded_nbytes

    def _hot(self, layer: int) -> KeptNeurons:
        buffer = self._layers[layer]
        return KeptNeurons(buffer.gate, buffer.up_down)

    def _arrived(self, layer: int) -> KeptNeurons:
        flight = self._front
        assert flight is not None
        assert flight.layer == layer, (flight.layer, layer)
        self._wait(self._ring, layer, flight.part, flight.neurons)
        return flight.slot

    def _send(self, layer: int, cargo: Cargo, slot: KeptNeurons) -> Flight[KeptNeurons]:
        neuron_ids = None if cargo == "records" else self._cold_ids[layer]
        transfer = self._link.gather(layer, neuron_ids, slot)
        return Flight(layer, cargo, cargo, slot, None, transfer, slot.nbytes)
