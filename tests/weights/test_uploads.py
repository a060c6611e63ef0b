"""Uploads to a device with memory of its own: nothing is overwritten while it may still be used, whatever the device does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius.errors import WeightReadError
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer, kept_neurons
from offload_sirius.weights.copiers import Transfer
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.hot_plan import hot_layouts
from offload_sirius.weights.hotset import HotSlot, HotStreamer, whole_slot
from offload_sirius.weights.kept import KeptStore
from offload_sirius.weights.layout import PARTS, Cargo, LayerLayout, Part, layer_layout
from offload_sirius.weights.load import Loader
from offload_sirius.weights.plan import CHUNK_NBYTES, NUM_CHUNKS
from offload_sirius.weights.streamer import WeightStreamer
from offload_sirius.weights.uploads import ChunkRoute, Chunks, DiskRoute, Event, PinnedRoute, Route, SliceRoute, UplinkCopier
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint

from .simulated import POISON, STEPS_AT_ONCE, Pick, QueueEvent, SimulatedDevice, SimulatedUplink
from .test_streamer import NoEmbedding

SPEC = open_checkpoint("synthetic:tiny?ffn=16&width=32&heads=4&kv_heads=2").spec
LAYOUT = layer_layout(SPEC, 2, 5)
NUM_LAYERS = 7


def numbered_store() -> HostStore:
    """Every byte of a layer is the layer's number."""
    store = HostStore(range(NUM_LAYERS), SPEC, LAYOUT, torch.bfloat16)
    for layer in range(NUM_LAYERS):
        store.layer(layer).storage.fill_(layer)
    return store


STORE = numbered_store()


def slot(value: int = POISON) -> LayerBuffer:
    return LayerBuffer(torch.full((LAYOUT.nbytes,), value, dtype=torch.uint8), SPEC, LAYOUT, torch.bfloat16)


def streamer_of(device: SimulatedDevice, route: Route, residents: set[int], num_slots: int) -> WeightStreamer:
    streamed = [layer for layer in range(NUM_LAYERS) if layer not in residents]
    return WeightStreamer(
        residents={layer: slot(layer) for layer in residents},
        streamed_layers=streamed,
        slots=[slot() for _ in range(num_slots)],
        copier=UplinkCopier(dict.fromkeys(streamed, route), device),
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
    )


class Computed:
    """What the device met where it computed on a part of a layer: whether its bytes were there at that time."""

    def __init__(self) -> None:
        self.right: list[bool] = []

    def reader(self, layer: int, part: Part, buffer: LayerBuffer) -> Callable[[], None]:
        return lambda: self.right.append(bool((buffer.parts[part] == layer).all()))


def run_pass(streamer: WeightStreamer, device: SimulatedDevice, computed: Computed, last_layer: int = NUM_LAYERS) -> None:
    for layer in range(last_layer):
        attention = streamer.attention(layer)
        device.compute(computed.reader(layer, "attention", attention))
        neurons = streamer.neurons(layer)
        assert isinstance(neurons, LayerBuffer)
        device.compute(computed.reader(layer, "records", neurons))
        device.compute(computed.reader(layer, "attention", attention))
        streamer.release(layer)


def picks(data: st.DataObject) -> Pick:
    return lambda below: data.draw(st.integers(0, below - 1))


@settings(deadline=None, max_examples=150)
@given(residents=st.sets(st.integers(0, NUM_LAYERS - 1)), num_slots=st.integers(2, 4), data=st.data())
def test_no_layer_is_computed_on_bytes_that_are_not_its_own(residents: set[int], num_slots: int, data: st.DataObject) -> None:
    device, computed = SimulatedDevice(picks(data)), Computed()
    streamer = streamer_of(device, PinnedRoute(STORE, range(NUM_LAYERS), device), residents, num_slots)
    for _ in range(2):
        run_pass(streamer, device, computed)
    device.close()
    assert len(computed.right) == 2 * 3 * NUM_LAYERS
    assert all(computed.right)


@settings(deadline=None, max_examples=60)
@given(given_up_at=st.integers(0, NUM_LAYERS - 1), num_slots=st.integers(2, 4), data=st.data())
def test_a_pass_given_up_half_way_does_not_disturb_the_next(given_up_at: int, num_slots: int, data: st.DataObject) -> None:
    device, computed = SimulatedDevice(picks(data)), Computed()
    streamer = streamer_of(device, PinnedRoute(STORE, range(NUM_LAYERS), device), set(), num_slots)
    run_pass(streamer, device, computed, given_up_at)
    streamer.attention(given_up_at)
    run_pass(streamer, device, computed)
    device.close()
    assert all(computed.right)


class CarelessRoute(PinnedRoute):
    """Overwrites slots without waiting for their last use."""

    def start(self, layer: int, part: Part, slot: LayerBuffer, last_use: Event) -> Transfer:
        assert isinstance(last_use, QueueEvent)
        return super().start(layer, part, slot, QueueEvent(last_use.device, come=True))


def test_the_simulated_device_would_catch_a_slot_that_is_overwritten_too_early() -> None:
    # Nothing goes on before everything is queued, and then copies whenever they can.
    device, computed = SimulatedDevice(lambda below: 0 if below == STEPS_AT_ONCE else below - 1), Computed()
    streamer = streamer_of(device, CarelessRoute(STORE, range(NUM_LAYERS), device), set(), 2)
    run_pass(streamer, device, computed)
    device.close()
    assert not all(computed.right)


def test_the_simulated_device_would_catch_computing_that_does_not_wait_for_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(QueueEvent, "wait", lambda self: None)
    device, computed = SimulatedDevice(lambda below: 0), Computed()
    streamer = streamer_of(device, PinnedRoute(STORE, range(NUM_LAYERS), device), set(), 2)
    run_pass(streamer, device, computed)
    device.close()
    assert not all(computed.right)


def test_the_host_waits_for_nothing_but_what_is_asked_for() -> None:
    """A device that does nothing at all until the host has queued two passes."""
    device, computed = SimulatedDevice(lambda below: 0), Computed()
    streamer = streamer_of(device, PinnedRoute(STORE, range(NUM_LAYERS), device), {3}, 2)
    run_pass(streamer, device, computed)
    run_pass(streamer, device, computed)
    assert computed.right == []
    device.close()
    assert len(computed.right) == 2 * 3 * NUM_LAYERS


@pytest.fixture
def uplink() -> Iterator[SimulatedUplink]:
    made = SimulatedUplink(delay_seconds=0.0005)
    yield made
    made.close()


def bring(copier: UplinkCopier, layer: int, place: LayerBuffer) -> None:
    for transfer in [copier.start(layer, part, place) for part in PARTS]:
        transfer.wait()


def test_a_layer_larger_than_the_chunks_passes_through_them_in_pieces(uplink: SimulatedUplink) -> None:
    spec = open_checkpoint("synthetic:tiny?ffn=100000").spec
    layout = layer_layout(spec, 2)
    assert layout.nbytes > NUM_CHUNKS * CHUNK_NBYTES
    store = HostStore(range(2), spec, layout, torch.bfloat16)
    for layer in range(2):
        store.layer(layer).storage.view(torch.int16)[:] = torch.arange(layout.nbytes // 2).remainder(30011 + layer)
    chunks = Chunks(uplink)
    copier = UplinkCopier(dict.fromkeys(range(2), ChunkRoute(store, range(2), chunks)), uplink)
    place = LayerBuffer(torch.zeros(layout.nbytes, dtype=torch.uint8), spec, layout, torch.bfloat16)
    for layer in (0, 1, 0):
        bring(copier, layer, place)
        assert torch.equal(place.storage, store.layer(layer).storage)
    assert copier.nbytes_copied == 3 * layout.nbytes
    assert uplink.from_pageable_nbytes == 0
    assert copier.peak_bytes_per_second is not None
    copier.close()
    chunks.close()
    assert uplink.pinned == {}


def test_chunks_that_cannot_be_pinned_either_still_serve() -> None:
    uplink = SimulatedUplink(max_pinned_nbytes=0)
    chunks = Chunks(uplink)
    assert chunks.report.reason == "simulated error 2"
    copier = UplinkCopier(dict.fromkeys(range(NUM_LAYERS), ChunkRoute(STORE, range(NUM_LAYERS), chunks)), uplink)
    place = slot()
    for layer in range(NUM_LAYERS):
        bring(copier, layer, place)
        assert (place.storage == layer).all()
    copier.close()
    chunks.close()


def test_a_chunk_is_used_again_after_an_upload_that_failed(uplink: SimulatedUplink, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = Chunks(uplink)
    place = slot()

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(uplink, "upload", fail)
        for _ in range(2 * NUM_CHUNKS):
            with pytest.raises(RuntimeError, match="the device is gone"):
                chunks.upload(STORE.layer(3).storage, place.storage, last_use=uplink.mark(), name="layer 3")
    chunks.upload(STORE.layer(3).storage, place.storage, last_use=uplink.mark(), name="layer 3").synchronize()
    assert (place.storage == 3).all()
    chunks.close()


def test_layers_from_disk_and_from_pageable_memory_are_those_from_the_arena(tiny: Checkpoint) -> None:
    uplink = SimulatedUplink()
    layout = layer_layout(tiny.spec, 4)
    readers = ReaderPool(tiny, 4)
    store = HostStore(range(4), tiny.spec, layout, torch.float32, registrar=uplink)
    Loader(tiny, readers, lambda nbytes: None).load_host_layers(store, range(4))
    staging = HostStore(range(2), tiny.spec, layout, torch.float32, registrar=uplink)
    assert store.pin_report().reason is staging.pin_report().reason is None
    chunks = Chunks(uplink)
    routes = (
        PinnedRoute(store, range(4), uplink),
        ChunkRoute(store, range(4), chunks),
        DiskRoute(tiny, readers, uplink, staging.buffers),
        DiskRoute(tiny, readers, chunks, staging.buffers),
    )
    place = LayerBuffer(torch.zeros(layout.nbytes, dtype=torch.uint8), tiny.spec, layout, torch.float32)
    for layer in (0, 1, 2, 3, 0):
        for route in routes:
            bring(UplinkCopier({layer: route}, uplink), layer, place)
            for role in tiny.spec.layer_roles():
                assert torch.equal(place.role(role), store.layer(layer).role(role))
    for route in routes:
        route.close()
    readers.close()
    uplink.close()


def test_a_read_error_reaches_who_waits_and_the_buffer_is_used_again(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    uplink = SimulatedUplink()
    layout = layer_layout(tiny.spec, 4)
    readers = ReaderPool(tiny, 2)
    staging = HostStore(range(2), tiny.spec, layout, torch.float32)
    copier = UplinkCopier(dict.fromkeys(range(4), DiskRoute(tiny, readers, uplink, staging.buffers)), uplink)
    place = LayerBuffer(torch.zeros(layout.nbytes, dtype=torch.uint8), tiny.spec, layout, torch.float32)

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("os.preadv", fail)
        for _ in range(3):
            transfers = [copier.start(0, part, place) for part in PARTS]
            for transfer in transfers:
                with pytest.raises(WeightReadError, match="Input/output error"):
                    transfer.wait()
    bring(copier, 1, place)
    copier.close()
    readers.close()


# Slices of layers.

IDS = torch.tensor([0, 3, 4, 9, 15])


def kept_store(layers: list[int]) -> KeptStore:
    """Kept neurons of every layer, those of some of them gathered."""
    kept = KeptStore(layers, LAYOUT, torch.bfloat16)
    for layer in range(NUM_LAYERS):
        kept.choose(layer, IDS, STORE.layer(layer))
    return kept


def slicing_streamer(
    device: SimulatedDevice, residents: set[int], unsliceable: set[int], gathered: list[int], num_slots: int
) -> WeightStreamer:
    streamed = [layer for layer in range(NUM_LAYERS) if layer not in residents]
    kept = kept_store(gathered)
    route = PinnedRoute(STORE, range(NUM_LAYERS), device)
    return WeightStreamer(
        residents={layer: slot(layer) for layer in residents},
        streamed_layers=streamed,
        slots=[slot() for _ in range(num_slots)],
        copier=UplinkCopier(dict.fromkeys(streamed, route), device, SliceRoute(STORE, kept, device)),
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
        sliceable=set(streamed) - unsliceable,
        kept=kept,
    )


def run_cargo(streamer: WeightStreamer, device: SimulatedDevice, computed: Computed, cargo: Cargo, last_layer: int) -> None:
    """A pass over the first layers; given up where there are more."""

    def all_are(layer: int, *tensors: torch.Tensor) -> None:
        device.compute(lambda: computed.right.append(all(bool((each.view(torch.uint8) == layer).all()) for each in tensors)))

    for layer in range(last_layer):
        attention = streamer.attention(layer)
        all_are(layer, attention.parts["attention"])
        neurons = streamer.neurons(layer)
        if isinstance(neurons, KeptNeurons):
            assert cargo == "kept"
            all_are(layer, neurons.gate, neurons.up_down)
        elif streamer.has_records(layer):
            all_are(layer, neurons.parts["records"])
        else:
            assert cargo == "gate"
            fetched = streamer.fetch(layer, IDS[: 1 + layer % 4])
            all_are(layer, neurons.gate)
            all_are(layer, fetched.wait())
        if cargo != "gate" or streamer.has_records(layer):  # where records are fetched, the next layer's attention block comes
            all_are(layer, attention.parts["attention"])
        streamer.release(layer)


@settings(deadline=None, max_examples=100)
@given(
    residents=st.sets(st.integers(0, NUM_LAYERS - 1), max_size=NUM_LAYERS - 2),
    unsliceable=st.sets(st.integers(0, NUM_LAYERS - 1)),
    gathered=st.sets(st.integers(0, NUM_LAYERS - 1)),
    num_slots=st.integers(2, 4),
    passes=st.lists(
        st.tuples(
            st.sampled_from(["records", "kept", "gate"]),
            st.sampled_from(["records", "kept", "gate"]),
            st.one_of(st.just(NUM_LAYERS), st.integers(0, NUM_LAYERS)),
        ),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_slices_are_never_computed_on_before_they_are_there_nor_overwritten_too_early(
    residents: set[int],
    unsliceable: set[int],
    gathered: set[int],
    num_slots: int,
    passes: list[tuple[Cargo, Cargo, int]],
    data: st.DataObject,
) -> None:
    device, computed = SimulatedDevice(picks(data)), Computed()
    num_slots = min(num_slots, NUM_LAYERS - len(residents))
    streamer = slicing_streamer(device, residents, unsliceable, sorted(gathered), num_slots)
    for cargo, following, last_layer in passes:
        streamer.begin("draft", cargo, following=following)
        run_cargo(streamer, device, computed, cargo, last_layer)
    device.close()
    assert all(computed.right)
    assert device.nbytes_copied == streamer.copied_nbytes
    in_flight = sum(flight.nbytes for flight in streamer._ring)
    assert streamer.copied_nbytes == streamer.pass_nbytes["draft"] + streamer.discarded_nbytes + in_flight


HOT = hot_layouts(SPEC, layer_layout(SPEC, 2), 5)


def hot_streamer(device: SimulatedDevice, num_whole: int, num_cold: int, streamed: set[int]) -> HotStreamer:
    """The last neurons of each layer are cold. streamed: layers of which nothing is resident; where there are any, there are
    slots for all of a layer and no others."""
    hot_spec = replace(SPEC, ffn_width=5)
    layers = {}
    for layer in sorted(set(range(NUM_LAYERS)) - streamed):
        storage = torch.full((HOT.resident.nbytes,), layer, dtype=torch.uint8)
        layers[layer] = LayerBuffer(storage, hot_spec, HOT.resident, torch.bfloat16)
    memory = torch.full((max(num_whole * LAYOUT.nbytes, num_cold * HOT.cold.kept_nbytes),), POISON, dtype=torch.uint8)
    cuts: list[tuple[Cargo, int, LayerLayout]] = [("records", num_whole, HOT.whole), ("cold", num_cold, HOT.cold)]
    slots: dict[Cargo, list[HotSlot]] = {
        cargo: [
            HotSlot({cargo: kept_neurons(part, each, torch.bfloat16)})
            for part in memory[: count * each.kept_nbytes].split(each.kept_nbytes)
        ]
        for cargo, count, each in cuts
    }
    if streamed:
        places = memory[: num_whole * LAYOUT.nbytes].split(LAYOUT.nbytes)
        whole = [whole_slot(LayerBuffer(place, SPEC, LAYOUT, torch.bfloat16), 5) for place in places]
        slots = {"records": whole, "hot": whole, "cold": whole}
    streamer = HotStreamer(
        layers=layers,
        streamed_layers=sorted(streamed),
        slots=slots,
        copier=UplinkCopier(
            dict.fromkeys(streamed, PinnedRoute(STORE, sorted(streamed), device)),
            device,
            SliceRoute(STORE, kept_store([]), device),
        ),
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
    )
    streamer._ids = {layer: torch.arange(SPEC.ffn_width) for layer in range(NUM_LAYERS)}
    return streamer


@settings(deadline=None, max_examples=100)
@given(
    num_whole=st.integers(2, 3),
    num_cold=st.integers(2, NUM_LAYERS),
    streamed=st.one_of(st.just(set()), st.sets(st.integers(0, NUM_LAYERS - 1), min_size=2)),
    passes=st.lists(
        st.tuples(st.sampled_from(["records", "hot", "cold"]), st.one_of(st.just(NUM_LAYERS), st.integers(0, NUM_LAYERS))),
        min_size=1,
        max_size=6,
    ),
    data=st.data(),
)
def test_slots_for_layers_that_are_resident_in_part_are_never_overwritten_too_early(
    num_whole: int, num_cold: int, streamed: set[int], passes: list[tuple[Cargo, int]], data: st.DataObject
) -> None:
    device, computed = SimulatedDevice(picks(data)), Computed()
    streamer = hot_streamer(device, num_whole, num_cold, streamed)

    def compute(layer: int, neurons: KeptNeurons | LayerBuffer, count: int) -> None:
        assert len(neurons.gate) == count
        tensors = (neurons.gate, neurons.up_down)
        device.compute(lambda: computed.right.append(all(bool((each.view(torch.uint8) == layer).all()) for each in tensors)))

    for cargo, last_layer in passes:
        streamer.begin("draft", cargo, following="cold")
        for layer in range(last_layer):
            device.compute(computed.reader(layer, "attention", streamer.attention(layer)))
            compute(layer, streamer.neurons(layer), SPEC.ffn_width if cargo == "records" else 5)
            if cargo == "cold":
                compute(layer, streamer.cold_neurons(layer), SPEC.ffn_width - 5)
            streamer.release(layer)
    device.close()
    assert all(computed.right)
    in_flight = sum(flight.nbytes for flight in streamer._ring)
    assert device.nbytes_copied == streamer.pass_nbytes["draft"] + streamer.discarded_nbytes + in_flight


def test_kept_neurons_arrive_by_one_copy_or_by_gathering(uplink: SimulatedUplink) -> None:
    kept = kept_store([2])
    copier = UplinkCopier(
        dict.fromkeys(range(NUM_LAYERS), PinnedRoute(STORE, [], uplink)), uplink, SliceRoute(STORE, kept, uplink)
    )
    for num_before, layer in enumerate((2, 3)):  # gathered in host memory, and not
        place = slot()
        copier.start(layer, "kept", place).wait()
        assert place.kept is not None
        assert (place.kept.gate.view(torch.uint8) == layer).all()
        assert (place.kept.up_down.view(torch.uint8) == layer).all()
        assert (place.storage[LAYOUT.attention_nbytes + LAYOUT.kept_nbytes :] == POISON).all()
        assert copier.nbytes_copied == (num_before + 1) * LAYOUT.kept_nbytes
    copier.close()


def test_gates_and_fetched_records_arrive_each_in_its_place(uplink: SimulatedUplink) -> None:
    store = HostStore(range(2), SPEC, LAYOUT, torch.bfloat16, registrar=uplink)
    for layer in range(2):
        numbers = torch.arange(16.0) + 16 * layer
        store.layer(layer).gate.copy_(numbers[:, None])
        store.layer(layer).up_down.copy_(numbers[:, None, None] + 100)
    assert store.pin_report().reason is None
    kept = KeptStore((), LAYOUT, torch.bfloat16)
    route = PinnedRoute(store, range(2), uplink)
    copier, place = UplinkCopier(dict.fromkeys(range(2), route), uplink, SliceRoute(store, kept, uplink)), slot()
    copier.start(1, "gate", place).wait()
    copier.fetch(1, torch.tensor([7, 0]), place).wait()
    assert place.gate[:, 0].tolist() == [16.0 + neuron for neuron in range(16)]
    assert place.up_down[:2, :, 0].tolist() == [[123.0, 123.0], [116.0, 116.0]]
    assert (place.up_down[2:].view(torch.uint8) == POISON).all()
    assert copier.nbytes_copied == LAYOUT.part_nbytes("gate") + 2 * LAYOUT.record_nbytes
    assert uplink.from_pageable_nbytes == 0
    copier.close()
    store.close()
