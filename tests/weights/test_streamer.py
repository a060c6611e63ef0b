"""The ring: order, wrap-around, what each pass brings, what is overwritten when, and what is counted."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.errors import WeightReadError
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer
from offload_sirius.weights.layout import PARTS, Cargo, Part, layer_layout
from offload_sirius.weights.streamer import WeightStreamer
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:tiny?ffn=16&width=32&heads=4&kv_heads=2").spec
LAYOUT = layer_layout(SPEC, 2, 5)
POISON = 0xFF
KEPT, FETCHED = 0x40, 0x80
"""Bytes of kept neurons and of fetched records are a layer's number and this."""
CARGOES: tuple[Cargo, ...] = ("records", "kept", "gate")


class NoEmbedding:
    def rows(self, token_ids: Tensor) -> Tensor:
        return token_ids


@dataclass
class LateTransfer:
    """Writes its layer's number when it is waited for, and not before."""

    destination: Tensor
    value: int
    done: bool = False

    def wait(self) -> None:
        if not self.done:
            self.destination.fill_(self.value)
            self.done = True


@dataclass
class LateCopier:
    """Poisons what it is going to overwrite, and delivers as late as it may."""

    started: list[tuple[int, str]] = field(default_factory=list)
    nbytes_copied: int = 0
    busy_seconds: float = 0.0
    peak_bytes_per_second: float | None = None

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> LateTransfer:
        self.started.append((layer, part))
        return self.deliver(slot.parts[part], layer + (KEPT if part == "kept" else 0))

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> LateTransfer:
        self.started.append((layer, f"{len(neuron_ids)} neurons"))
        return self.deliver(slot.up_down[: len(neuron_ids)].view(torch.uint8), layer + FETCHED)

    def deliver(self, destination: Tensor, value: int) -> LateTransfer:
        destination.fill_(POISON)
        self.nbytes_copied += destination.numel()
        return LateTransfer(destination, value)

    def close(self) -> None:
        pass


@dataclass
class DisorderlyCopier(LateCopier):
    """Delivers in any order, some early and some only when they are waited for."""

    pick: Callable[[int], int] = lambda below: 0
    pending: list[LateTransfer] = field(default_factory=list)

    def deliver(self, destination: Tensor, value: int) -> LateTransfer:
        assert not any(overlap(each.destination, destination) for each in self.pending if not each.done)
        self.pending.append(super().deliver(destination, value))
        transfer = self.pending[-1]
        for _ in range(self.pick(3)):
            self.pending.pop(self.pick(len(self.pending))).wait()
            if not self.pending:
                break
        return transfer


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two byte ranges have a byte in common."""
    return one.data_ptr() < other.data_ptr() + other.nbytes and other.data_ptr() < one.data_ptr() + one.nbytes


def buffer(value: int) -> LayerBuffer:
    return LayerBuffer(torch.full((LAYOUT.nbytes,), value, dtype=torch.uint8), SPEC, LAYOUT, torch.bfloat16)


def make(
    num_layers: int,
    resident: set[int],
    num_slots: int,
    copier: LateCopier | None = None,
    sliceable: Collection[int] = (),
) -> tuple[WeightStreamer, LateCopier]:
    copier = copier or LateCopier()
    streamer = WeightStreamer(
        residents={layer: buffer(layer) for layer in resident},
        streamed_layers=[layer for layer in range(num_layers) if layer not in resident],
        slots=[buffer(POISON) for _ in range(num_slots)],
        copier=copier,
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
        sliceable=sliceable,
    )
    return streamer, copier


def run_pass(streamer: WeightStreamer, num_layers: int) -> None:
    for layer in range(num_layers):
        attention = streamer.attention(layer)
        assert (attention.parts["attention"] == layer).all()
        neurons = streamer.neurons(layer)
        assert isinstance(neurons, LayerBuffer)
        assert (neurons.parts["attention"] == layer).all(), "attention is still in use"
        assert (neurons.parts["records"] == layer).all()
        streamer.release(layer)


@settings(deadline=None)
@given(num_layers=st.integers(1, 9), num_slots=st.integers(2, 5), passes=st.integers(1, 3), data=st.data())
def test_no_layer_is_computed_on_bytes_that_are_not_its_own(
    num_layers: int, num_slots: int, passes: int, data: st.DataObject
) -> None:
    resident = data.draw(st.sets(st.integers(0, num_layers - 1), max_size=num_layers))
    streamer, _ = make(num_layers, resident, num_slots)
    for _ in range(passes):
        run_pass(streamer, num_layers)


@settings(deadline=None)
@given(num_slots=st.integers(2, 5), resident=st.sets(st.integers(0, 6)), given_up_at=st.integers(0, 7), data=st.data())
def test_the_order_in_which_transfers_arrive_does_not_matter(
    num_slots: int, resident: set[int], given_up_at: int, data: st.DataObject
) -> None:
    streamer, _ = make(7, resident, num_slots, DisorderlyCopier(pick=lambda below: data.draw(st.integers(0, below - 1))))
    run_pass(streamer, given_up_at)
    run_pass(streamer, 7)
    run_pass(streamer, 7)


@settings(deadline=None)
@given(given_up_at=st.integers(0, 5), half=st.booleans(), num_slots=st.integers(2, 4))
def test_a_pass_that_was_given_up_half_way_does_not_disturb_the_next(given_up_at: int, half: bool, num_slots: int) -> None:
    streamer, _ = make(6, {2}, num_slots)
    run_pass(streamer, given_up_at)
    if half:
        streamer.attention(given_up_at)
    run_pass(streamer, 6)


def test_nothing_is_copied_before_it_is_asked_for() -> None:
    _, copier = make(4, set(), 2)
    assert copier.started == []


def test_the_first_layers_of_the_next_pass_follow_the_last_ones_of_this() -> None:
    streamer, copier = make(3, set(), 2)
    run_pass(streamer, 3)
    assert [layer for layer, part in copier.started if part == "attention"] == [0, 1, 2, 0, 1]


def test_attention_is_copied_before_the_records_of_a_layer() -> None:
    streamer, copier = make(2, set(), 2)
    streamer.attention(0)
    assert copier.started == [(0, "attention"), (0, "records"), (1, "attention"), (1, "records")]


def test_bytes_count_for_the_phase_that_computes_on_them_and_sum_up_with_what_is_under_way() -> None:
    streamer, copier = make(4, {1}, 2)
    streamer.begin("prefill")
    run_pass(streamer, 4)
    for _ in range(2):
        streamer.begin("full")
        run_pass(streamer, 4)
    assert streamer.pass_nbytes == {"prefill": 3 * LAYOUT.nbytes, "draft": 0, "correction": 0, "full": 6 * LAYOUT.nbytes}
    assert streamer.copied_nbytes == copier.nbytes_copied == (9 + 2) * LAYOUT.nbytes


def test_a_model_that_is_resident_needs_no_copier() -> None:
    streamer = WeightStreamer(
        residents={0: buffer(0)},
        streamed_layers=[],
        slots=[],
        copier=None,
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
    )
    run_pass(streamer, 1)
    streamer.close()
    assert streamer.copied_nbytes == 0
    assert streamer.busy_seconds == 0
    assert streamer.peak_bytes_per_second is None


def test_an_error_of_the_link_reaches_the_model() -> None:
    streamer, copier = make(2, set(), 2)

    class Broken(LateTransfer):
        def wait(self) -> None:
            raise OSError("broken")

    copier.start = lambda layer, part, slot: Broken(slot.parts[part], layer)  # type: ignore[method-assign]
    with pytest.raises(OSError, match="broken"):
        streamer.attention(0)


def test_a_pass_that_met_a_read_error_does_not_disturb_the_next() -> None:
    streamer, copier = make(3, set(), 2)
    start = copier.start

    class Broken(LateTransfer):
        def wait(self) -> None:
            raise WeightReadError("broken")

    copier.start = lambda layer, part, slot: Broken(slot.parts[part], layer)  # type: ignore[method-assign]
    with pytest.raises(WeightReadError, match="broken"):
        streamer.attention(0)
    copier.start = start  # type: ignore[method-assign]
    run_pass(streamer, 3)


# Passes that do not take all of a layer.


@dataclass(frozen=True)
class Pass:
    """One pass, as far as it gets."""

    cargo: Cargo
    following: Cargo
    num_layers: int = 6
    """Layers that are computed on before it is given up."""
    half: bool = False
    """Given up behind the attention block of the next."""
    fetch_sizes: tuple[int, ...] = (3,)
    """Records that a layer fetches, where its gates are there; layers take turns."""
    fetch_is_given_up: bool = False
    """The last fetch is not waited for."""


def run_sparse(
    streamer: WeightStreamer, this: Pass, sliceable: Collection[int], resident: Collection[int], all_layers: int
) -> None:
    """Every byte that is computed on is the layer's own, and of the right part."""
    streamer.begin("draft" if this.cargo != "records" else "correction", this.cargo, following=this.following)
    last = min(this.num_layers, all_layers)
    for layer in range(last):
        attention = streamer.attention(layer)
        assert (attention.parts["attention"] == layer).all()
        whole = layer in resident or layer not in sliceable or this.cargo == "records"
        neurons = streamer.neurons(layer)
        assert streamer.has_records(layer) == whole
        if whole:
            assert isinstance(neurons, LayerBuffer)
            assert (neurons.parts["records"] == layer).all()
        elif this.cargo == "kept":
            assert isinstance(neurons, KeptNeurons)
            assert (neurons.gate.view(torch.uint8) == layer + KEPT).all()
            assert (neurons.up_down.view(torch.uint8) == layer + KEPT).all()
        else:
            assert isinstance(neurons, LayerBuffer)
            size = this.fetch_sizes[layer % len(this.fetch_sizes)]
            fetched = streamer.fetch(layer, torch.arange(size))
            if this.fetch_is_given_up and layer == last - 1:
                return
            assert (fetched.wait().view(torch.uint8) == layer + FETCHED).all()
            assert (neurons.parts["gate"] == layer).all()
            streamer.release(layer)
            continue
        assert (attention.parts["attention"] == layer).all(), "attention is still in use"
        streamer.release(layer)
    if this.half and last < all_layers:
        streamer.attention(last)


def in_flight(streamer: WeightStreamer) -> int:
    early = LAYOUT.part_nbytes("attention") if streamer._early is not None else 0
    return sum(flight.nbytes for flight in streamer._ring) + early


passes = st.builds(
    Pass,
    cargo=st.sampled_from(CARGOES),
    following=st.sampled_from(CARGOES),
    num_layers=st.one_of(st.just(6), st.integers(0, 6)),
    half=st.booleans(),
    fetch_sizes=st.lists(st.integers(1, 16), min_size=1, max_size=3).map(tuple),
    fetch_is_given_up=st.booleans(),
)


@settings(deadline=None, max_examples=200)
@given(
    num_slots=st.integers(2, 5),
    resident=st.sets(st.integers(0, 5)),
    on_disk=st.sets(st.integers(0, 5)),
    sequence=st.lists(passes, max_size=6),
    data=st.data(),
)
def test_whatever_passes_follow_each_other_nothing_is_computed_on_wrong_bytes_and_every_byte_is_counted_once(
    num_slots: int, resident: set[int], on_disk: set[int], sequence: list[Pass], data: st.DataObject
) -> None:
    copier = DisorderlyCopier(pick=lambda below: data.draw(st.integers(0, below - 1)))
    streamed = set(range(6)) - resident
    sliceable = streamed - on_disk
    streamer, _ = make(6, resident, min(num_slots, max(2, len(streamed))), copier, sliceable)
    for this in sequence:
        run_sparse(streamer, this, sliceable, resident, 6)
        assert streamer.copied_nbytes == sum(streamer.pass_nbytes.values()) + streamer.discarded_nbytes + in_flight(streamer)


@dataclass
class Alarm:
    """A real signal in front of the call of that number."""

    number: int
    moment: int
    num_calls: int = 0

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Count calls of it."""

        def watched(*arguments: Any) -> Any:
            self.num_calls += 1
            if self.num_calls == self.moment:
                signal.raise_signal(self.number)
            return call(*arguments)

        return watched


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("cargo", ["records", "gate", "kept"])
def test_a_signal_as_a_transfer_begins_or_a_layer_is_released_leaves_every_byte_counted_once(
    cargo: Cargo, number: int, request: pytest.FixtureRequest
) -> None:
    """In front of each transfer of two passes, and as each layer leaves the ring."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt, as the command line has it
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    this = Pass(cargo=cargo, following=cargo)
    for moment in range(12 * 3):
        streamer, copier = make(6, set(), 2, DisorderlyCopier(pick=lambda below: 0), set(range(6)))
        alarm = Alarm(number, moment)
        copier.start, copier.fetch = alarm.before(copier.start), alarm.before(copier.fetch)  # type: ignore[method-assign]
        streamer._ring.advance = alarm.before(streamer._ring.advance)  # type: ignore[method-assign]
        with contextlib.suppress(KeyboardInterrupt):
            for _ in range(2):
                run_sparse(streamer, this, set(range(6)), set(), 6)
        assert alarm.num_calls >= moment
        run_sparse(streamer, this, set(range(6)), set(), 6)
        assert streamer.copied_nbytes == sum(streamer.pass_nbytes.values()) + streamer.discarded_nbytes + in_flight(streamer)


@settings(deadline=None)
@given(
    num_slots=st.integers(2, 6),
    resident=st.sets(st.integers(0, 5), max_size=4),
    on_disk=st.sets(st.integers(0, 5)),
    cargoes=st.lists(st.sampled_from(CARGOES), min_size=2, max_size=6),
)
def test_right_forecasts_discard_nothing(num_slots: int, resident: set[int], on_disk: set[int], cargoes: list[Cargo]) -> None:
    streamed = set(range(6)) - resident
    sliceable = streamed - on_disk
    streamer, copier = make(6, resident, min(num_slots, len(streamed)), sliceable=sliceable)
    for cargo, following in pairwise(cargoes):
        run_sparse(streamer, Pass(cargo, following), sliceable, resident, 6)
    assert streamer.discarded_nbytes == 0
    brought = [(layer, what) for layer, what in copier.started if what != "attention" and "neurons" not in what]
    wanted = [(layer, cargo if layer in sliceable else "records") for cargo in cargoes for layer in sorted(streamed)]
    assert brought == wanted[: len(brought)]


@pytest.mark.parametrize(("cargo", "part"), [("records", "records"), ("kept", "kept"), ("gate", "gate")])
def test_a_pass_brings_its_cargo_of_layers_that_can_be_sliced_and_all_of_the_others(cargo: Cargo, part: str) -> None:
    streamer, copier = make(3, set(), 2, sliceable={0, 2})
    run_sparse(streamer, Pass(cargo, "records"), {0, 2}, (), 3)
    neurons = [(layer, what) for layer, what in copier.started if what not in ("attention", "3 neurons")]
    assert neurons == [(0, part), (1, "records"), (2, part), (0, "records"), (1, "records")]


def test_behind_the_last_layer_comes_what_the_following_pass_takes() -> None:
    streamer, copier = make(3, set(), 2, sliceable={0, 1, 2})
    run_sparse(streamer, Pass("records", "kept"), {0, 1, 2}, (), 3)
    assert copier.started[-4:] == [(0, "attention"), (0, "kept"), (1, "attention"), (1, "kept")]
    run_sparse(streamer, Pass("kept", "kept"), {0, 1, 2}, (), 3)
    run_sparse(streamer, Pass("kept", "records"), {0, 1, 2}, (), 3)
    assert copier.started[-4:] == [(0, "attention"), (0, "records"), (1, "attention"), (1, "records")]
    assert streamer.discarded_nbytes == 0


def test_a_wrong_forecast_is_thrown_away_and_counted() -> None:
    streamer, copier = make(3, set(), 2, sliceable={0, 1})
    run_sparse(streamer, Pass("records", "kept"), {0, 1}, (), 3)
    run_sparse(streamer, Pass("records", "records"), {0, 1}, (), 3)
    slice_nbytes = LAYOUT.part_nbytes("attention") + LAYOUT.part_nbytes("kept")
    assert streamer.discarded_nbytes == 2 * slice_nbytes
    assert streamer.pass_nbytes["correction"] == 2 * 3 * LAYOUT.nbytes
    assert copier.nbytes_copied == 2 * 3 * LAYOUT.nbytes + 2 * slice_nbytes + 2 * LAYOUT.nbytes


def test_a_wrong_forecast_for_a_layer_that_cannot_be_sliced_costs_what_it_brought() -> None:
    streamer, _ = make(3, set(), 2, sliceable=())
    run_sparse(streamer, Pass("records", "gate"), (), (), 3)
    run_sparse(streamer, Pass("records", "records"), (), (), 3)
    assert streamer.discarded_nbytes == 2 * LAYOUT.nbytes


def test_bytes_of_drafts_are_attention_and_slices_and_what_was_fetched() -> None:
    streamer, _ = make(4, {1}, 2, sliceable={0, 2})
    run_sparse(streamer, Pass("gate", "kept", fetch_sizes=(3, 1, 5)), {0, 2}, {1}, 4)
    attention, gate = LAYOUT.part_nbytes("attention"), LAYOUT.part_nbytes("gate")
    fetched = (3 + 5) * LAYOUT.record_nbytes
    assert streamer.pass_nbytes["draft"] == 2 * (attention + gate) + fetched + LAYOUT.nbytes
    run_sparse(streamer, Pass("kept", "kept"), {0, 2}, {1}, 4)
    kept = 2 * (attention + LAYOUT.part_nbytes("kept")) + LAYOUT.nbytes
    assert streamer.pass_nbytes["draft"] == 2 * (attention + gate) + fetched + LAYOUT.nbytes + kept


def test_behind_records_the_link_goes_on_with_an_attention_block_before_they_are_computed_on() -> None:
    streamer, copier = make(4, set(), 2, sliceable={0, 1, 2, 3})
    streamer.begin("draft", "gate", following="gate")
    streamer.attention(0)
    streamer.neurons(0)
    streamer.fetch(0, torch.arange(2)).wait()
    assert copier.started[-2:] == [(0, "2 neurons"), (2, "attention")]
    streamer.release(0)
    assert copier.started[-2:] == [(2, "attention"), (2, "gate")]


def test_a_pass_given_up_behind_a_fetch_reads_that_layer_again() -> None:
    streamer, _ = make(4, set(), 2, sliceable={0, 1, 2, 3})
    run_sparse(streamer, Pass("gate", "gate", num_layers=1, fetch_is_given_up=True), {0, 1, 2, 3}, (), 4)
    run_sparse(streamer, Pass("gate", "gate"), {0, 1, 2, 3}, (), 4)


def test_records_are_fetched_for_the_layer_whose_gates_are_there_and_no_other() -> None:
    streamer, copier = make(3, set(), 2, sliceable={0, 1, 2})
    streamer.begin("draft", "gate")
    streamer.attention(0)
    streamer.neurons(0)
    place = streamer.fetch(0, torch.tensor([3, 9])).wait()
    assert (place.shape, copier.started[-2]) == ((2, 2, 32), (0, "2 neurons"))
    with pytest.raises(AssertionError):
        streamer.fetch(1, torch.tensor([3]))
    streamer, _ = make(3, set(), 2)
    streamer.begin("draft", "gate")
    streamer.attention(0)
    with pytest.raises(AssertionError):
        streamer.fetch(0, torch.tensor([3]))


class Choices:
    """A store that only writes down what it is told."""

    def __init__(self) -> None:
        self.chosen: list[tuple[int, list[int], LayerBuffer]] = []

    def choose(self, layer: int, neuron_ids: Tensor, source: LayerBuffer) -> None:
        assert all((source.parts[part] == layer).all() for part in PARTS), "the layer is whole while it is chosen from"
        self.chosen.append((layer, neuron_ids.tolist(), source))


def test_kept_neurons_are_taken_from_the_slot_or_from_where_the_layer_lives_in_host_memory() -> None:
    kept, slots, arena = Choices(), [buffer(POISON) for _ in range(2)], {2: buffer(2)}
    streamer = WeightStreamer(
        residents={1: buffer(1)},
        streamed_layers=[0, 2, 3],
        slots=slots,
        copier=LateCopier(),
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
        sliceable={0, 2, 3},
        kept=kept,  # type: ignore[arg-type]
        arena=arena,
    )
    streamer.begin("prefill", "records", following="kept")
    for layer in range(4):
        streamer.attention(layer)
        streamer.neurons(layer)
        streamer.keep(layer, torch.tensor([layer, 7]))
        streamer.release(layer)
    assert [(layer, ids) for layer, ids, _ in kept.chosen] == [(0, [0, 7]), (2, [2, 7]), (3, [3, 7])]
    sources = [source for *_, source in kept.chosen]
    assert sources[0] in slots
    assert sources[1] is arena[2]
    assert sources[2] in slots
