"""Slots through which the layers of a cycle pass, in order, again and again. Knows neither what is sent nor who sends it.

While one slot is computed on, the others fill with the layers that follow. The order wraps: behind the last layer comes the first
one of the next pass. What a pass takes of each layer, its cargo, may differ from pass to pass. So may the layers of which it
takes anything, and the slots that hold it: where the next pass has other slots, the ring drains at the end of this one.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from offload_sirius.errors import OffloadSiriusError
from offload_sirius.weights.copiers import Transfer
from offload_sirius.weights.interrupts import interrupts_held
from offload_sirius.weights.layout import Cargo

SlotT = TypeVar("SlotT")


@dataclass(frozen=True)
class Flight(Generic[SlotT]):
    """A layer on its way into a slot, or there."""

    layer: int
    cargo: Cargo
    """Of the pass."""
    part: Cargo
    """Of the layer, which may bring more than the pass takes."""
    slot: SlotT
    attention: Transfer | None
    """None where the attention block does not travel."""
    neurons: Transfer
    nbytes: int
    """What crosses the link."""


Send = Callable[[int, Cargo, SlotT], Flight[SlotT]]
"""Begin to overwrite a slot with a layer's cargo."""


class Ring(Generic[SlotT]):
    """Flights under way and arrived, the first of them being computed on."""

    def __init__(
        self,
        layers: Mapping[Cargo, Sequence[int]],
        slots: Mapping[Cargo, Sequence[SlotT]],
        send: Send[SlotT],
        *,
        wraps: bool = True,
    ) -> None:
        """layers: cargo -> those of which it takes anything, in order; of two cargoes the one takes none that the other does not.
        slots: cargo -> slots for it, two or more; cargoes with the same list share their slots.
        wraps: behind the last layer comes the first one of the next pass; else nothing, until that pass asks for it.

        No more slots are used than the shortest cycle has layers: so a layer is never sent for a pass before the one ahead of it
        has computed on that layer. Nothing is sent before the first layer is asked for.
        """
        self.discarded_nbytes = 0
        """Bytes that were sent for a pass that did not come."""
        self._layers = {cargo: list(each) for cargo, each in layers.items()}
        self._most_slots = min(len(each) for each in layers.values())
        self._slots = slots
        self._send = send
        self._flights: deque[Flight[SlotT]] = deque()
        self._wraps = wraps
        self._next = 0
        self._broken_off = False
        self._cargo: Cargo = "records"
        self._following: Cargo = "records"
        self._sending: Cargo = "records"
        """Cargo of the pass whose layers are being sent: of this one, and behind its last layer of the following one."""

    def __iter__(self) -> Iterator[Flight[SlotT]]:
        """What is under way or there, in order."""
        return iter(self._flights)

    @property
    def next_layer(self) -> int:
        """The layer that is sent next."""
        return self._layers[self._sending][self._next]

    def begin(self, cargo: Cargo, following: Cargo) -> None:
        """A pass begins, and another will probably follow. One that was given up half-way may be followed by any."""
        self._cargo, self._following = cargo, following
        # As many slots as layers: all of this pass is under way, and the first slot that is free is for the next one.
        self._sending = cargo if self._next else following

    def front(self, layer: int) -> Flight[SlotT]:
        """The flight of the layer that is computed on next; sends it, and those behind it, where it is not under way."""
        first = self._flights[0] if self._flights else None
        if self._broken_off or first is None or (first.layer, first.cargo) != (layer, self._cargo):
            self.restart_at(layer)
        return self._flights[0]

    def fill(self) -> None:
        """Send the first layers of the pass that begins, where nothing is under way."""
        if not self._flights:
            self.restart_at(self._layers[self._cargo][0])

    def advance(self) -> Flight[SlotT]:
        """The first layer has been computed on: its slot goes to the next one that is not under way."""
        flight = self._flights.popleft()
        if self._may_send_into(self._slots[flight.cargo]):
            self._start(flight.slot)
        return flight

    def break_off(self) -> None:
        """What is in the ring is not to be trusted: the next layer that is asked for is sent anew."""
        self._broken_off = True

    def restart_at(self, layer: int) -> None:
        """The first layer ever, or a pass that was given up half-way: let what is under way arrive, and begin at the layer."""
        for flight in self._flights:
            for transfer in (flight.attention, flight.neurons):
                with contextlib.suppress(OffloadSiriusError):  # whoever asked for that layer was told; this pass reads it again
                    if transfer is not None:
                        transfer.wait()
        with interrupts_held():
            self.discarded_nbytes += sum(flight.nbytes for flight in self._flights)
            self._flights.clear()
        self._broken_off = False
        self._next = self._layers[self._cargo].index(layer)
        self._sending = self._cargo
        slots = self._slots[self._cargo]
        for slot in slots[: self._most_slots]:
            if self._may_send_into(slots) or not self._flights:
                self._start(slot)

    def _may_send_into(self, slots: Sequence[SlotT]) -> bool:
        """Whether the next layer has its place among these, and is to be sent before it is asked for."""
        return self._slots[self._sending] is slots and (self._wraps or self._next != 0)

    def _start(self, slot: SlotT) -> None:
        layers, cargo = self._layers[self._sending], self._sending
        layer = layers[self._next]
        with interrupts_held():  # a transfer that was begun and is not in the ring would write to its slot unseen, and uncounted
            self._next = (self._next + 1) % len(layers)
            if self._next == 0:
                self._sending = self._following
            self._flights.append(self._send(layer, cargo, slot))
