"""Ways into a slot: what arrives, what is counted, and how long it takes at a set rate."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from offload_sirius.errors import WeightReadError
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import BusyMeter, Copier, DiskCopier, HostCopier, PacedCopier, TieredCopier
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.kept import KeptStore
from offload_sirius.weights.layout import PARTS, LayerLayout, layer_layout
from offload_sirius.weights.load import Loader
from offload_sirius_loaders.checkpoint import Checkpoint

FLOAT = torch.float32


@pytest.fixture
def readers(tiny: Checkpoint) -> Iterator[ReaderPool]:
    pool = ReaderPool(tiny, 4)
    yield pool
    pool.close()


@pytest.fixture
def layout(tiny: Checkpoint) -> LayerLayout:
    return layer_layout(tiny.spec, FLOAT.itemsize)


@pytest.fixture
def store(tiny: Checkpoint, layout: LayerLayout, readers: ReaderPool) -> HostStore:
    host = HostStore(range(4), tiny.spec, layout, FLOAT)
    Loader(tiny, readers, lambda nbytes: None).load_host_layers(host, range(4))
    return host


@pytest.fixture
def slot(tiny: Checkpoint, layout: LayerLayout) -> LayerBuffer:
    return LayerBuffer(torch.full((layout.nbytes,), 0xEE, dtype=torch.uint8), tiny.spec, layout, FLOAT)


def bring(copier: Copier, layer: int, slot: LayerBuffer) -> None:
    for transfer in [copier.start(layer, part, slot) for part in PARTS]:
        transfer.wait()


def same_weights(one: LayerBuffer, other: LayerBuffer, tiny: Checkpoint) -> bool:
    return all(torch.equal(one.role(role), other.role(role)) for role in tiny.spec.layer_roles())


def test_disk_and_host_bring_the_same_bytes(tiny: Checkpoint, store: HostStore, slot: LayerBuffer, readers: ReaderPool) -> None:
    host, disk = HostCopier(store), DiskCopier(tiny, readers)
    for layer in range(4):
        for copier in (host, disk):
            slot.storage.fill_(0xEE)
            bring(copier, layer, slot)
            assert same_weights(slot, store.layer(layer), tiny)
    host.close()


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_bytes_are_counted_where_they_are_copied(
    tier: str, tiny: Checkpoint, store: HostStore, slot: LayerBuffer, readers: ReaderPool, layout: LayerLayout
) -> None:
    copier: Copier = HostCopier(store) if tier == "host" else DiskCopier(tiny, readers)
    bring(copier, 0, slot)
    bring(copier, 1, slot)
    assert copier.nbytes_copied == 2 * layout.nbytes
    assert copier.busy_seconds > 0
    copier.close()


def test_each_layer_comes_from_its_tier(tiny: Checkpoint, store: HostStore, slot: LayerBuffer, readers: ReaderPool) -> None:
    host, disk = HostCopier(store), DiskCopier(tiny, readers)
    copier = TieredCopier({0: host, 1: disk, 2: host, 3: host}, host)
    bring(copier, 0, slot)
    assert (host.nbytes_copied > 0, disk.nbytes_copied) == (True, 0)
    bring(copier, 1, slot)
    assert disk.nbytes_copied == host.nbytes_copied
    assert copier.nbytes_copied == 2 * host.nbytes_copied
    copier.close()


class InstantCopier:
    """Copies nothing, at once."""

    nbytes_copied = 0
    busy_seconds = 0.0
    peak_bytes_per_second = None

    def start(self, layer: int, part: str, slot: LayerBuffer) -> InstantCopier:
        return self

    def fetch(self, layer: int, neuron_ids: torch.Tensor, slot: LayerBuffer) -> InstantCopier:
        return self

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Clock:
    """Time that passes only by sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_paced_link_takes_bytes_over_rate(monkeypatch: pytest.MonkeyPatch, slot: LayerBuffer) -> None:
    clock = Clock(monkeypatch)
    copier = PacedCopier(InstantCopier(), 1000.0)
    bring(copier, 0, slot)
    assert clock.now == pytest.approx(100 + slot.storage.numel() / 1000)
    assert copier.busy_seconds == pytest.approx(slot.storage.numel() / 1000)
    assert copier.peak_bytes_per_second == 1000


def test_a_paced_link_carries_one_transfer_at_a_time_and_is_idle_when_nobody_asks(
    monkeypatch: pytest.MonkeyPatch, slot: LayerBuffer
) -> None:
    clock = Clock(monkeypatch)
    copier = PacedCopier(InstantCopier(), 1000.0)
    seconds = slot.storage.numel() / 1000
    bring(copier, 0, slot)
    clock.sleep(50)
    first = [copier.start(0, part, slot) for part in PARTS]
    clock.sleep(seconds / 2)
    second = [copier.start(1, part, slot) for part in PARTS]
    assert copier.busy_seconds == pytest.approx(1.5 * seconds)
    for transfer in [*first, *second]:
        transfer.wait()
    assert clock.now == pytest.approx(100 + seconds + 50 + 2 * seconds)
    assert copier.busy_seconds == pytest.approx(3 * seconds)


def test_overlapping_transfers_are_busy_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = BusyMeter()
    meter.open()
    clock.sleep(1)
    meter.open()
    clock.sleep(1)
    meter.close(10)
    clock.sleep(1)
    assert meter.busy_seconds == 3
    meter.close(20, seconds=2)
    clock.sleep(5)
    assert meter.busy_seconds == 3
    assert meter.nbytes == 30
    assert meter.peak_bytes_per_second == 10


def test_a_read_error_reaches_who_waits_through_every_wrapper(
    tiny: Checkpoint, slot: LayerBuffer, readers: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    disk = DiskCopier(tiny, readers)
    copier = PacedCopier(TieredCopier({0: disk}, disk), 1e12)
    with pytest.raises(WeightReadError, match="Input/output error"):
        bring(copier, 0, slot)


# Slices of layers.

IDS = torch.tensor([2, 3, 50, 175])


@pytest.fixture
def sliced(tiny: Checkpoint) -> LayerLayout:
    return layer_layout(tiny.spec, FLOAT.itemsize, len(IDS))


@pytest.fixture
def sliced_store(tiny: Checkpoint, sliced: LayerLayout, readers: ReaderPool) -> HostStore:
    host = HostStore(range(4), tiny.spec, sliced, FLOAT)
    Loader(tiny, readers, lambda nbytes: None).load_host_layers(host, range(4))
    return host


@pytest.fixture
def sliced_slot(tiny: Checkpoint, sliced: LayerLayout) -> LayerBuffer:
    return LayerBuffer(torch.full((sliced.nbytes,), 0xEE, dtype=torch.uint8), tiny.spec, sliced, FLOAT)


@pytest.fixture
def kept(sliced: LayerLayout, sliced_store: HostStore) -> KeptStore:
    """There is room for the kept neurons of layers 1 and 2."""
    kept = KeptStore((1, 2), sliced, FLOAT)
    for layer in range(3):
        kept.choose(layer, (IDS + layer).clamp(max=175), sliced_store.layer(layer))
    return kept


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_kept_neurons_arrive_whether_they_are_gathered_already_or_on_the_way(
    layer: int, sliced_store: HostStore, kept: KeptStore, sliced_slot: LayerBuffer, sliced: LayerLayout
) -> None:
    assert (kept.place(layer) is None) == (layer == 0)
    copier = HostCopier(sliced_store, kept)
    copier.start(layer, "kept", sliced_slot).wait()
    ids, whole, found = (IDS + layer).clamp(max=175), sliced_store.layer(layer), sliced_slot.kept
    assert found is not None
    assert torch.equal(found.gate, whole.gate[ids])
    assert torch.equal(found.up, whole.up[ids])
    assert torch.equal(found.down, whole.down[ids])
    assert copier.nbytes_copied == sliced.kept_nbytes == 4 * 3 * 64 * 4
    behind = sliced_slot.storage[sliced.attention_nbytes + sliced.kept_nbytes :]
    assert (behind == 0xEE).all(), "no more was written than was counted"
    copier.close()


def test_gates_arrive_alone_and_single_records_behind_them(
    sliced_store: HostStore, sliced_slot: LayerBuffer, sliced: LayerLayout
) -> None:
    copier = HostCopier(sliced_store)
    copier.start(3, "gate", sliced_slot).wait()
    whole = sliced_store.layer(3)
    assert torch.equal(sliced_slot.gate, whole.gate)
    assert (sliced_slot.up_down.view(torch.uint8) == 0xEE).all()
    assert copier.nbytes_copied == 176 * 64 * 4
    ids = torch.tensor([9, 0, 140])
    copier.fetch(3, ids, sliced_slot).wait()
    assert torch.equal(sliced_slot.up_down[:3], whole.up_down[ids])
    assert (sliced_slot.up_down[3:].view(torch.uint8) == 0xEE).all()
    assert torch.equal(sliced_slot.gate, whole.gate)
    assert copier.nbytes_copied == 176 * 64 * 4 + 3 * sliced.record_nbytes
    copier.close()


def test_kept_neurons_of_a_layer_on_disk_come_from_host_memory(
    tiny: Checkpoint, sliced_store: HostStore, kept: KeptStore, sliced_slot: LayerBuffer, readers: ReaderPool
) -> None:
    host, disk = HostCopier(sliced_store, kept), DiskCopier(tiny, readers)
    copier = TieredCopier({0: host, 1: disk}, host)
    copier.start(1, "kept", sliced_slot).wait()
    assert (disk.nbytes_copied, copier.nbytes_copied) == (0, sliced_slot.parts["kept"].numel())
    copier.start(1, "records", sliced_slot).wait()
    assert disk.nbytes_copied == sliced_slot.parts["records"].numel()
    copier.fetch(0, IDS, sliced_slot).wait()
    assert torch.equal(sliced_slot.up_down[:4], sliced_store.layer(0).up_down[IDS])
    copier.close()


def test_a_host_without_layers_still_brings_kept_neurons(
    tiny: Checkpoint, sliced: LayerLayout, sliced_store: HostStore, kept: KeptStore, sliced_slot: LayerBuffer, readers: ReaderPool
) -> None:
    host, disk = HostCopier(HostStore((), tiny.spec, sliced, FLOAT), kept), DiskCopier(tiny, readers)
    copier = TieredCopier(dict.fromkeys(range(4), disk), host)
    copier.start(2, "kept", sliced_slot).wait()
    assert sliced_slot.kept is not None
    assert torch.equal(sliced_slot.kept.gate, sliced_store.layer(2).gate[kept.ids(2)])
    assert copier.nbytes_copied == host.nbytes_copied > 0
    copier.close()


def test_records_of_a_layer_on_disk_are_never_fetched(tiny: Checkpoint, sliced_slot: LayerBuffer, readers: ReaderPool) -> None:
    with pytest.raises(AssertionError, match="layer 2 is on disk"):
        DiskCopier(tiny, readers).fetch(2, IDS, sliced_slot)


def test_slices_over_a_paced_link_take_their_own_bytes_over_the_rate(
    monkeypatch: pytest.MonkeyPatch, sliced_slot: LayerBuffer, sliced: LayerLayout
) -> None:
    clock = Clock(monkeypatch)
    copier = PacedCopier(InstantCopier(), 1000.0)
    copier.start(0, "kept", sliced_slot).wait()
    assert clock.now == pytest.approx(100 + sliced.kept_nbytes / 1000)
    copier.start(0, "gate", sliced_slot).wait()
    copier.fetch(0, IDS, sliced_slot).wait()
    nbytes = sliced.kept_nbytes + sliced.part_nbytes("gate") + 4 * sliced.record_nbytes
    assert clock.now == pytest.approx(100 + nbytes / 1000)
    assert copier.busy_seconds == pytest.approx(nbytes / 1000)
