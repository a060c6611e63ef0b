"""Which layer is in which slot, and when: a ring of slots through which the streamed layers pass, in order, again and again.

While one slot is computed on, the others fill with the layers that follow. The order wraps: behind the last layer comes the
first one of the next pass, so the link works on while the head and the sampler do, and the next pass finds its first layers
there. Satisfies the model's WeightSource. Knows no files and no streams; those are the copier's.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from offload_sirius.errors import OffloadSiriusError
from offload_sirius.trace import Moment, Tracer
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import Copier, Transfer
from offload_sirius.weights.embedding import Embedding
from offload_sirius.weights.layout import Part

Phase = Literal["prefill", "draft", "correction", "full"]


@dataclass(frozen=True)
class Flight:
    """A layer on its way into a slot, or there."""

    layer: int
    slot: LayerBuffer
    attention: Transfer
    records: Transfer


class LayerTrace:
    """Turns what a model asks a source for into spans: what it waited for, and what it computed between two requests."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._computing: tuple[int, str, Moment] | None = None

    def wait(self, layer: int, part: Part, transfer: Transfer) -> None:
        """Wait for a part."""
        began = self._tracer.clock.mark()
        transfer.wait()
        self._tracer.span("wait", f"layer {layer} {part}", began, self._tracer.clock.mark(), layer=layer, part=part)

    def computing(self, layer: int, what: str) -> None:
        """The model has what it asked for and computes on it from now on."""
        self._computing = layer, what, self._tracer.clock.mark()

    def computed(self) -> None:
        """The model asks for something else: what it computed is done, or queued on the device."""
        if self._computing is not None:
            layer, what, began = self._computing
            self._tracer.span("compute", f"layer {layer} {what}", began, self._tracer.clock.mark(), layer=layer)
            self._computing = None


class WeightStreamer:
    """Weights of a model, part of them resident, the rest streamed through slots."""

    def __init__(
        self,
        *,
        residents: Mapping[int, LayerBuffer],
        streamed_layers: Sequence[int],
        slots: Sequence[LayerBuffer],
        copier: Copier | None,
        embedding: Embedding,
        final_norm: Tensor,
        head: Tensor,
        tracer: Tracer | None = None,
    ) -> None:
        """copier: None where nothing is streamed. Nothing is copied before the first layer is asked for."""
        assert not streamed_layers or (len(slots) >= 2 and copier is not None)
        self.final_norm = final_norm
        self.head = head
        self.phase: Phase = "prefill"
        """Under which the bytes of the coming layers are counted."""
        self.pass_nbytes: dict[Phase, int] = dict.fromkeys(("prefill", "draft", "correction", "full"), 0)
        """Bytes of the streamed layers that were computed on, by phase."""
        self.wait_seconds = 0.0
        """Time the host has waited for layers."""
        self._residents = residents
        self._streamed = list(streamed_layers)
        self._slots = list(slots)
        self._copier = copier
        self._embedding = embedding
        self._ring: deque[Flight] = deque()
        self._next = 0
        self._broken_off = False
        self._trace = None if tracer is None else LayerTrace(tracer)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [S] on the host -> [S, D] on the device."""
        return self._embedding.rows(token_ids)

    def attention(self, layer: int) -> LayerBuffer:
        """The layer's attention block; blocks until it is there."""
        buffer = self._residents.get(layer)
        if buffer is None:
            if self._broken_off or not self._ring or self._ring[0].layer != layer:
                self._restart_at(layer)
            buffer = self._arrived(self._ring[0], "attention")
        if self._trace is not None:
            self._trace.computing(layer, "attention")
        return buffer

    def neurons(self, layer: int) -> LayerBuffer:
        """The layer's neurons; blocks until they are there."""
        if self._trace is not None:
            self._trace.computed()
        buffer = self._residents.get(layer)
        if buffer is None:
            assert self._ring[0].layer == layer
            buffer = self._arrived(self._ring[0], "records")
        if self._trace is not None:
            self._trace.computing(layer, "neurons")
        return buffer

    def release(self, layer: int) -> None:
        """The layer has been computed on: its slot goes to the next one that is not under way."""
        if self._trace is not None:
            self._trace.computed()
        if layer in self._residents:
            return
        flight = self._ring.popleft()
        assert flight.layer == layer
        self.pass_nbytes[self.phase] += flight.slot.storage.numel()
        self._start(flight.slot)

    @property
    def copied_nbytes(self) -> int:
        """Bytes the link has carried, prefetches included."""
        return self._copier.nbytes_copied if self._copier else 0

    @property
    def busy_seconds(self) -> float:
        """Time in which the link has carried something."""
        return self._copier.busy_seconds if self._copier else 0.0

    @property
    def peak_bytes_per_second(self) -> float | None:
        """The link's best rate, where it is known."""
        return self._copier.peak_bytes_per_second if self._copier else None

    def close(self) -> None:
        """Finish what is under way and end the copier's threads."""
        if self._copier is not None:
            self._copier.close()

    def _start(self, slot: LayerBuffer) -> None:
        assert self._copier is not None
        layer = self._streamed[self._next]
        self._next = (self._next + 1) % len(self._streamed)
        # Attention first: it is computed on while the records, which are most of a layer, still arrive.
        attention = self._copier.start(layer, "attention", slot)
        records = self._copier.start(layer, "records", slot)
        self._ring.append(Flight(layer, slot, attention, records))

    def _restart_at(self, layer: int) -> None:
        """The first layer ever, or a pass that was given up half-way: let what is under way arrive, and begin at the layer."""
        for flight in self._ring:
            for transfer in (flight.attention, flight.records):
                with contextlib.suppress(OffloadSiriusError):  # whoever asked for that layer was told; this pass reads it again
                    transfer.wait()
        self._ring.clear()
        self._broken_off = False
        self._next = self._streamed.index(layer)
        for slot in self._slots:
            self._start(slot)

    def _arrived(self, flight: Flight, part: Part) -> LayerBuffer:
        """The flight's slot, once the part is in it."""
        transfer = flight.attention if part == "attention" else flight.records
        began = time.perf_counter()
        try:
            if self._trace is None:
                transfer.wait()
            else:
                self._trace.wait(flight.layer, part, transfer)
        except BaseException:  # a read error, or an interruption: what is in the ring is not to be trusted
            self._broken_off = True
            raise
        self.wait_seconds += time.perf_counter() - began
        return flight.slot
