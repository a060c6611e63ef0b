"""Pinning host memory piece by piece: what is registered, what is left when the driver refuses, and what is given back."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref

import pytest
import torch

from offload_sirius.weights.host import HostStore
from offload_sirius.weights.layout import PAGE_NBYTES, layer_layout
from offload_sirius.weights.pinning import Pinning
from offload_sirius_loaders import open_checkpoint

from .simulated import SimulatedUplink

SPEC = open_checkpoint("synthetic:tiny?width=72&ffn=177").spec
LAYOUT = layer_layout(SPEC, 2)


def store_of(num_layers: int, uplink: SimulatedUplink, **more: int) -> HostStore:
    return HostStore(range(num_layers), SPEC, LAYOUT, torch.bfloat16, registrar=uplink, **more)


def test_every_layer_is_pinned_in_whole_pages_that_no_two_share() -> None:
    assert LAYOUT.nbytes % PAGE_NBYTES, "a layer that fills its pages shows nothing"
    uplink = SimulatedUplink()
    store = store_of(5, uplink)
    report = store.pin_report()
    assert (report.num_pinned, report.reason) == (5, None)
    assert len(uplink.pinned) == 5
    assert all(start % PAGE_NBYTES == nbytes % PAGE_NBYTES == 0 for start, nbytes in uplink.pinned.items())
    assert sum(uplink.pinned.values()) == store.nbytes == 5 * LAYOUT.host_nbytes
    store.close()
    assert uplink.pinned == {}


def test_what_is_behind_the_first_refusal_stays_pageable() -> None:
    uplink = SimulatedUplink(max_pinned_nbytes=3 * LAYOUT.host_nbytes)
    store = store_of(5, uplink)
    report = store.pin_report()
    assert [store.is_pinned(layer) for layer in range(5)] == [True, True, True, False, False]
    assert report.pinned_nbytes == 3 * LAYOUT.nbytes
    assert report.pageable_nbytes == 2 * LAYOUT.nbytes
    assert report.reason == "simulated error 2"
    store.close()
    assert uplink.pinned == {}


def test_layers_that_share_buffers_are_pinned_once() -> None:
    uplink = SimulatedUplink()
    store = store_of(5, uplink, num_buffers=2)
    assert store.pin_report().num_pinned == 2
    assert all(store.is_pinned(layer) for layer in range(5))
    assert store.layer(0) is store.layer(2) is store.layer(4)
    assert store.nbytes == 2 * LAYOUT.host_nbytes
    store.close()


def test_memory_is_given_back_when_a_store_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[weakref.ref[mmap.mmap]] = []
    mapping = mmap.mmap

    class Watched(mapping):  # type: ignore[misc, valid-type]
        def __init__(self, *_: object, **__: object) -> None:
            mapped.append(weakref.ref(self))

    monkeypatch.setattr("offload_sirius.weights.mapping.mmap.mmap", Watched)
    store = store_of(3, SimulatedUplink())
    assert [reference() is not None for reference in mapped] == [True]
    store.close()
    assert store.nbytes == 0
    gc.collect()
    assert mapped[0]() is None


def test_a_registrar_that_breaks_down_is_one_that_refuses() -> None:
    uplink = SimulatedUplink()

    class Broken:
        def register(self, address: int, nbytes: int) -> str | None:
            raise RuntimeError("no driver\nat all")

        def unregister(self, address: int) -> None:
            uplink.unregister(address)

    store = HostStore(range(2), SPEC, LAYOUT, torch.bfloat16, registrar=Broken())
    assert store.pin_report().reason == "no driver at all"
    assert store.pin_report().num_pinned == 0
    store.close()


def test_a_store_that_nothing_reads_directly_pins_nothing() -> None:
    store = HostStore(range(2), SPEC, LAYOUT, torch.bfloat16)
    assert not store.is_pinned(0)
    store.close()


def test_closing_waits_for_the_buffer_under_way_and_begins_no_other() -> None:
    uplink, entered, go_on = SimulatedUplink(), threading.Event(), threading.Event()

    class SlowRegistrar:
        def register(self, address: int, nbytes: int) -> str | None:
            entered.set()
            go_on.wait()
            return uplink.register(address, nbytes)

        def unregister(self, address: int) -> None:
            uplink.unregister(address)

    memory = HostStore(range(3), SPEC, LAYOUT, torch.bfloat16)
    pinning = Pinning([buffer.storage for buffer in memory.buffers], SlowRegistrar())
    entered.wait()
    closing = threading.Thread(target=pinning.close)
    closing.start()
    while not pinning._closing:
        pass
    go_on.set()
    closing.join()
    assert uplink.pinned == {}
    assert uplink.most_pinned_nbytes == LAYOUT.host_nbytes
    pinning.close()


@pytest.mark.parametrize("num_layers", [0, 1])
def test_an_arena_is_exactly_as_large_as_what_is_in_it(num_layers: int) -> None:
    uplink = SimulatedUplink()
    store = store_of(num_layers, uplink)
    assert store.nbytes == num_layers * LAYOUT.host_nbytes
    assert store.nbytes - num_layers * LAYOUT.nbytes < PAGE_NBYTES
    store.close()
