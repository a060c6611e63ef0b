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
