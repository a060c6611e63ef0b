"""The ring by itself: order, wrap-around, slots that change with the cargo, and what is thrown away. Bytes are written late."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius.errors import WeightReadError
from offload_sirius.weights.layout import Cargo
from offload_sirius.weights.ring import Flight, Ring

NBYTES: dict[Cargo, int] = {"records": 100, "kept": 30, "gate": 40, "hot": 35, "cold": 70}
LAYERS = (0, 2, 3, 5, 8)
"""Those that pass: a ring's layers need not follow each other."""
FEWER = (2, 5, 8)
"""Those of which `hot` takes anything."""
CELLS = 12


@dataclass(frozen=True, eq=False)
class Slot:
    """Some cells of one memory."""

    cells: range


def cut(size: int) -> list[Slot]:
    """The memory in slots of that many cells."""
    return [Slot(range(start, start + size)) for start in range(0, CELLS - size + 1, size)]


SHARED = cut(3)
SLICED: dict[Cargo, Sequence[Slot]] = {"records": SHARED, "kept": SHARED, "gate": SHARED}
OVERLAID: dict[Cargo, Sequence[Slot]] = {"records": cut(5), "cold": cut(2)}
"""The same memory in two ways."""
PARTLY: dict[Cargo, Sequence[Slot]] = {"records": SHARED, "hot": SHARED, "cold": SHARED}
"""One slot more than the shortest cycle has layers."""
ANY_SLOTS = pytest.mark.parametrize(
    "slots", [SLICED, OVERLAID, PARTLY], ids=["the same slots", "other slots", "the same slots and other layers"]
)


def cycle(cargo: Cargo) -> tuple[int, ...]:
    """Layers that pass in a pass with that cargo."""
    return FEWER if cargo == "hot" else LAYERS


@dataclass
class LateTransfer:
    """Writes what it brings when it is waited for, or when the memory says."""

    memory: Memory
    slot: Slot
    value: tuple[int, Cargo]
    error: WeightReadError | None = None
    done: bool = False

    def wait(self) -> None:
        if self.error is not None:
            self.done = True
            raise self.error
        if not self.done:
            for cell in self.slot.cells:
                self.memory.cells[cell] = self.value
            self.done = True


@dataclass
class Memory:
    """Poisoned by everything that is sent; nothing else may be on its way to the same cells."""

    pick: Callable[[int], int] = lambda below: 0
    cells: list[object] = field(default_factory=lambda: ["poison"] * CELLS)
    under_way: list[LateTransfer] = field(default_factory=list)
    sent: list[tuple[int, Cargo]] = field(default_factory=list)
    broken: bool = False

    def send(self, layer: int, cargo: Cargo, slot: Slot) -> Flight[Slot]:
        self.under_way = [each for each in self.under_way if not each.done]
        assert not any(set(each.slot.cells) & set(slot.cells) for each in self.under_way), "two transfers to the same bytes"
        self.sent.append((layer, cargo))
        for cell in slot.cells:
            self.cells[cell] = "poison"
        transfer = LateTransfer(self, slot, (layer, cargo), WeightReadError("broken") if self.broken else None)
        self.under_way.append(transfer)
        for _ in range(self.pick(3)):
            arriving = self.under_way[self.pick(len(self.under_way))]
            if arriving.error is None:
                arriving.wait()
        return Flight(layer, cargo, cargo, slot, None, transfer, NBYTES[cargo])

    @property
    def nbytes(self) -> int:
        return sum(NBYTES[cargo] for _, cargo in self.sent)


def make(slots: Mapping[Cargo, Sequence[Slot]], memory: Memory | None = None, *, wraps: bool = True) -> tuple[Ring[Slot], Memory]:
    memory = memory or Memory()
    return Ring({cargo: cycle(cargo) for cargo in slots}, slots, memory.send, wraps=wraps), memory


def run_pass(ring: Ring[Slot], memory: Memory, cargo: Cargo, following: Cargo, num_layers: int = len(LAYERS)) -> int:
    """Go through so many layers; the bytes of those that were computed on."""
    ring.begin(cargo, following)
    nbytes = 0
    for layer in cycle(cargo)[:num_layers]:
        flight = ring.front(layer)
        flight.neurons.wait()
        assert (flight.layer, flight.cargo) == (layer, cargo)
        assert {memory.cells[cell] for cell in flight.slot.cells} == {(layer, cargo)}
        assert ring.advance() is flight
        under_way = [each.layer for each in ring]
        assert len(under_way) == len(set(under_way)), "a layer is sent again only when it has been computed on"
        nbytes += flight.nbytes
    return nbytes


def in_flight(ring: Ring[Slot]) -> int:
    return sum(flight.nbytes for flight in ring)


@dataclass(frozen=True)
class Pass:
    """One pass, as far as it gets."""

    cargo: Cargo
    following: Cargo
    num_layers: int
    asks_for_more: bool
    """Given up behind the arrival of the next layer."""
    breaks_off: bool
    """Whoever waited was interrupted."""
    fills: bool
    """It only sends for what comes: a draft that moves nothing."""


def passes(slots: Mapping[Cargo, Sequence[Slot]]) -> st.SearchStrategy[list[Pass]]:
    """Any sequence of passes."""
    cargo = st.sampled_from(sorted(slots))
    whole = st.just(len(LAYERS))
    each = st.builds(
        Pass,
        cargo=cargo,
        following=cargo,
        num_layers=st.one_of(whole, st.integers(0, len(LAYERS))),
        asks_for_more=st.booleans(),
        breaks_off=st.booleans(),
        fills=st.booleans(),
    )
    return st.lists(each, max_size=8)


@ANY_SLOTS
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_whatever_passes_follow_each_other_every_layer_is_computed_on_its_own_bytes_and_every_byte_is_counted_once(
    slots: Mapping[Cargo, Sequence[Slot]], data: st.DataObject
) -> None:
    ring, memory = make(slots, Memory(pick=lambda below: data.draw(st.integers(0, below - 1))), wraps=data.draw(st.booleans()))
    computed = 0
    for this in data.draw(passes(slots)):
        if this.fills:
            ring.begin(this.cargo, this.following)
            ring.fill()
        else:
            computed += run_pass(ring, memory, this.cargo, this.following, this.num_layers)
            if this.asks_for_more and this.num_layers < len(cycle(this.cargo)):
                ring.front(cycle(this.cargo)[this.num_layers]).neurons.wait()
        if this.breaks_off:
            ring.break_off()
        assert memory.nbytes == computed + ring.discarded_nbytes + in_flight(ring)


@ANY_SLOTS
@settings(deadline=None)
@given(data=st.data())
def test_right_forecasts_discard_nothing_and_send_each_layer_once_a_pass(
    slots: Mapping[Cargo, Sequence[Slot]], data: st.DataObject
) -> None:
    ring, memory = make(slots)
    cargoes = data.draw(st.lists(st.sampled_from(sorted(slots)), min_size=2, max_size=6))
    for cargo, following in pairwise(cargoes):
        run_pass(ring, memory, cargo, following)
    assert ring.discarded_nbytes == 0
    wanted = [(layer, cargo) for cargo in cargoes for layer in cycle(cargo)]
    assert memory.sent == wanted[: len(memory.sent)]
    assert len(memory.sent) >= sum(len(cycle(cargo)) for cargo in cargoes[:-1])


def test_nothing_is_sent_before_a_layer_is_asked_for() -> None:
    ring, memory = make(SLICED)
    ring.begin("records", "records")
    assert memory.sent == []
    assert ring.next_layer == 0


def test_behind_the_last_layer_comes_the_first_of_what_the_following_pass_takes() -> None:
    ring, memory = make(SLICED)
    run_pass(ring, memory, "records", "kept")
    assert memory.sent[-4:] == [(0, "kept"), (2, "kept"), (3, "kept"), (5, "kept")]
    assert [flight.layer for flight in ring] == [0, 2, 3, 5]
    assert ring.next_layer == 8


def test_behind_the_last_layer_comes_the_first_of_which_the_following_pass_takes_anything() -> None:
    ring, memory = make(PARTLY)
    run_pass(ring, memory, "cold", "hot")
    assert memory.sent[-4:] == [(8, "cold"), (2, "hot"), (5, "hot"), (8, "hot")], "no more slots than layers"
    run_pass(ring, memory, "hot", "cold")
    assert memory.sent[-3:] == [(0, "cold"), (2, "cold"), (3, "cold")]
    assert ring.next_layer == 5
    assert ring.discarded_nbytes == 0


def test_where_the_following_pass_has_other_slots_the_ring_drains_at_the_end_of_this_one() -> None:
    ring, memory = make(OVERLAID)
    run_pass(ring, memory, "records", "cold")
    assert memory.sent == [(layer, "records") for layer in LAYERS]
    assert list(ring) == []
    ring.begin("cold", "cold")
    ring.fill()
    assert memory.sent[len(LAYERS) :] == [(layer, "cold") for layer in LAYERS], "six slots, but no more than five layers"
    assert ring.discarded_nbytes == 0


@ANY_SLOTS
def test_a_ring_that_does_not_wrap_sends_nothing_for_a_pass_before_it_asks(slots: Mapping[Cargo, Sequence[Slot]]) -> None:
    ring, memory = make(slots, wraps=False)
    wanted = []
    for cargo in [*sorted(slots)] * 2:
        run_pass(ring, memory, cargo, cargo)
        wanted += [(layer, cargo) for layer in cycle(cargo)]
        assert list(ring) == []
        assert memory.sent == wanted
    assert ring.discarded_nbytes == 0


def test_filling_sends_nothing_where_something_is_under_way() -> None:
    ring, memory = make(OVERLAID)
    for _ in range(3):
        ring.begin("cold", "cold")
        ring.fill()
    assert memory.sent == [(layer, "cold") for layer in LAYERS]
    run_pass(ring, memory, "cold", "cold")
    ring.begin("cold", "cold")
    ring.fill()
    assert memory.sent == [(layer, "cold") for layer in LAYERS] * 2
    assert ring.discarded_nbytes == 0


def test_a_slot_is_filled_again_as_soon_as_its_layer_has_been_computed_on_and_not_before() -> None:
    ring, memory = make({"records": SHARED[:2]})
    ring.begin("records", "records")
    ring.front(0)
    assert memory.sent == [(0, "records"), (2, "records")]
    ring.front(0).neurons.wait()
    assert len(memory.sent) == 2
    ring.advance()
    assert memory.sent[2:] == [(3, "records")]
    assert [flight.slot for flight in ring] == [SHARED[1], SHARED[0]]


@pytest.mark.parametrize("given_up_at", range(len(LAYERS)))
def test_a_pass_that_was_given_up_costs_what_was_under_way(given_up_at: int) -> None:
    ring, memory = make({"records": SHARED[:2]})
    run_pass(ring, memory, "records", "records", given_up_at)
    under_way = in_flight(ring)
    run_pass(ring, memory, "records", "records")
    assert ring.discarded_nbytes == under_way == (200 if given_up_at else 0)


def test_a_wrong_forecast_costs_what_was_under_way() -> None:
    ring, memory = make(SLICED)
    run_pass(ring, memory, "records", "kept")
    assert ring.discarded_nbytes == 0
    run_pass(ring, memory, "records", "kept")
    assert ring.discarded_nbytes == len(SHARED) * NBYTES["kept"]


def test_what_was_broken_off_is_sent_anew() -> None:
    ring, memory = make({"records": SHARED[:2]})
    ring.begin("records", "records")
    ring.front(0)
    ring.break_off()
    assert not ring.front(0).neurons.done  # type: ignore[attr-defined]
    assert memory.sent == [(0, "records"), (2, "records")] * 2
    assert ring.discarded_nbytes == 200
    ring.front(0)
    assert len(memory.sent) == 4, "once is enough"


def test_an_error_under_way_is_told_to_whoever_waited_for_it_and_to_no_one_else() -> None:
    ring, memory = make({"records": SHARED[:2]})
    memory.broken = True
    ring.begin("records", "records")
    with pytest.raises(WeightReadError, match="broken"):
        ring.front(0).neurons.wait()
    ring.break_off()
    memory.broken = False
    assert run_pass(ring, memory, "records", "records") == 500
