"""The way to a CUDA device: slot safety on a real one, and what can be told without."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import offload_sirius
from offload_sirius.engine import NoProgress
from offload_sirius.machine import physical_cores
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.cuda import CudaClock, CudaGraphs, CudaUplink, numa_node_at
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.layout import PAGE_NBYTES, align, layer_layout
from offload_sirius.weights.pieces import reading_cost
from offload_sirius.weights.plan import MIN_READERS
from offload_sirius.weights.streamer import WeightStreamer
from offload_sirius.weights.uploads import ChunkRoute, Chunks, PinnedRoute, Route, UplinkCopier
from offload_sirius_loaders import open_checkpoint

from .test_streamer import NoEmbedding

SPEC = open_checkpoint("synthetic:small?ffn=20000").spec
LAYOUT = layer_layout(SPEC, 2)
NUM_LAYERS = 7
BUSY_CYCLES = 2_000_000
"""About a millisecond of a GPU: longer than a layer takes to be copied."""


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("0\n", 0), ("-1\n", None), ("what\n", None)])
def test_the_numa_node_of_a_device_is_what_the_kernel_says(text: str, node: int | None, tmp_path: Path) -> None:
    place = tmp_path / "0000:3b:00.0"
    place.mkdir()
    (place / "numa_node").write_text(text)
    assert numa_node_at(0, 0x3B, 0, tmp_path) == node


def test_a_device_that_the_kernel_does_not_list_has_no_node(tmp_path: Path) -> None:
    assert numa_node_at(0, 1, 0, tmp_path) is None


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: run without -m gpu")
    return torch.device("cuda", 0)


def slot(device: torch.device) -> LayerBuffer:
    return LayerBuffer(torch.full((LAYOUT.nbytes,), 0xFF, dtype=torch.uint8, device=device), SPEC, LAYOUT, torch.bfloat16)


def numbered(uplink: CudaUplink) -> HostStore:
    """Every byte of a layer is the layer's number."""
    store = HostStore(range(NUM_LAYERS), SPEC, LAYOUT, torch.bfloat16, registrar=uplink)
    for layer in range(NUM_LAYERS):
        store.layer(layer).storage.fill_(layer)
    assert store.pin_report().reason is None
    return store


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("num_slots", [2, 3])
def test_no_layer_is_computed_on_bytes_that_are_not_its_own(device: torch.device, pinned: bool, num_slots: int) -> None:
    uplink = CudaUplink(device)
    store = numbered(uplink)
    chunks = Chunks(uplink)
    route: Route = PinnedRoute(store, range(NUM_LAYERS), uplink) if pinned else ChunkRoute(store, range(NUM_LAYERS), chunks)
    streamer = WeightStreamer(
        residents={},
        streamed_layers=range(NUM_LAYERS),
        slots=[slot(device) for _ in range(num_slots)],
        copier=UplinkCopier(dict.fromkeys(range(NUM_LAYERS), route), uplink),
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
    )
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    rng = random.Random(num_slots)
    for _ in range(6):
        for layer in range(NUM_LAYERS):
            for part in ("attention", "records"):
                buffer = streamer.attention(layer) if part == "attention" else streamer.neurons(layer)
                if rng.random() < 0.5:  # now the copies are ahead of what is computed, now they are behind
                    torch.cuda._sleep(BUSY_CYCLES)
                assert isinstance(buffer, LayerBuffer)
                wrong += (buffer.parts[part] != layer).sum()
            streamer.release(layer)
    assert int(wrong) == 0
    streamer.close()
    chunks.close()
    store.close()


class StubbornUplink(CudaUplink):
    """Pins nothing."""

    def register(self, address: int, nbytes: int) -> str | None:
        return "refused by the test"


@pytest.mark.gpu
@pytest.mark.parametrize("uplink_kind", [CudaUplink, StubbornUplink])
@pytest.mark.parametrize("where", ["host", "host and disk", "disk"])
def test_answers_are_those_of_a_resident_model_by_every_route(
    where: str, uplink_kind: type[CudaUplink], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path))
    monkeypatch.setattr("offload_sirius.engine.building.uplink_to", uplink_kind)
    model = "synthetic:small?dtype=F32"
    with offload_sirius.load(model, mode="full", device="cuda", max_context=48) as engine:
        plan = engine.plan
        expected = engine.generate([1, 2, 3], max_new_tokens=20, ignore_eos=True).token_ids
    fixed = plan.device_nbytes - plan.device_bill["resident_layers"] - plan.device_bill["slots"]
    staging = plan.host_bill["staging"]
    reading = reading_cost(open_checkpoint(model), physical_cores()).nbytes(MIN_READERS) + plan.host_bill["embedding"]
    num_host = {"host": 8, "host and disk": 4, "disk": 0}[where]
    with offload_sirius.load(
        model,
        mode="full",
        device="cuda",
        max_context=48,
        device_memory=str(fixed + 2 * plan.layer_nbytes),
        host_memory=str(reading + staging + num_host * align(plan.layer_nbytes, PAGE_NBYTES)),
        progress=NoWarnings(),
    ) as engine:
        assert bool(engine.plan.host_layers) == ("host" in where)
        assert bool(engine.plan.disk_layers) == ("disk" in where)
        assert engine.generate([1, 2, 3], max_new_tokens=20, ignore_eos=True).token_ids == expected


class NoWarnings(NoProgress):
    def warn(self, line: str) -> None:
        pass


@pytest.mark.gpu
def test_the_host_does_not_wait_for_copies_out_of_pinned_memory(device: torch.device) -> None:
    uplink = CudaUplink(device)
    store = numbered(uplink)
    route = PinnedRoute(store, range(NUM_LAYERS), uplink)
    place = slot(device)
    torch.cuda._sleep(1000 * BUSY_CYCLES)  # the slot's last use is not over for a long time
    last_use = uplink.mark()
    transfer = route.start(0, "records", place, last_use)
    transfer.wait()
    assert not last_use.event.query(), "the host has waited for the device"
    torch.cuda.synchronize(device)
    assert place.parts["records"].unique().tolist() == [0]
    uplink.close()
    store.close()


@pytest.mark.gpu
def test_bytes_and_busy_time_are_counted_where_copies_are(device: torch.device) -> None:
    uplink = CudaUplink(device)
    store = numbered(uplink)
    place = slot(device)
    for _ in range(5):
        uplink.upload(store.layer(0).storage, place.storage, last_use=uplink.mark(), name="layer 0").synchronize()
    assert uplink.nbytes_copied == 5 * LAYOUT.nbytes
    assert uplink.peak_bytes_per_second is not None
    assert uplink.busy_seconds >= uplink.nbytes_copied / uplink.peak_bytes_per_second * 0.99
    uplink.close()
    store.close()


@pytest.mark.gpu
def test_moments_of_the_device_come_in_order_on_the_host_clock(device: torch.device) -> None:
    clock = CudaClock(device)
    first = clock.mark()
    torch.cuda._sleep(BUSY_CYCLES)
    second = clock.mark()
    assert first() < second()


@pytest.mark.gpu
def test_a_graph_computes_on_what_is_in_its_tensors_when_it_is_launched(device: torch.device) -> None:
    graphs = CudaGraphs(device)
    given, doubled, squared = (torch.ones(1000, device=device) for _ in range(3))
    double = graphs.record(lambda: doubled.copy_(2 * given))
    square = graphs.record(lambda: squared.copy_(given * given))
    for value in (3.0, 5.0):
        given.fill_(value)
        square()
        double()
        assert doubled.unique().tolist() == [2 * value]
        assert squared.unique().tolist() == [value * value]


@pytest.mark.gpu
def test_what_cannot_be_captured_is_an_error_and_the_stream_is_the_one_it_was(device: torch.device) -> None:
    graphs, number = CudaGraphs(device), torch.ones((), device=device)
    before = torch.cuda.current_stream(device)
    with pytest.raises(RuntimeError):
        graphs.record(lambda: number.add_(number.item()))
    assert torch.cuda.current_stream(device) == before
    assert float(number + 1) > 1, "the device works on"


@pytest.mark.gpu
def test_a_graph_may_be_captured_while_another_thread_copies(device: torch.device) -> None:
    uplink, graphs = CudaUplink(device), CudaGraphs(device)
    store, place = numbered(uplink), slot(device)
    number, stop = torch.zeros((), device=device), threading.Event()

    def copy() -> None:
        while not stop.is_set():
            uplink.upload(store.layer(0).storage, place.storage, last_use=uplink.mark(), name="layer 0").synchronize()

    with ThreadPoolExecutor(1) as executor:
        copying = executor.submit(copy)
        add = graphs.record(lambda: number.add_(1))
        stop.set()
        copying.result()
    before = float(number)
    add()
    assert float(number) == before + 1
    uplink.close()
    store.close()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [2, 5, 16])
def test_recorded_draft_steps_draft_what_launched_ones_do_and_answers_are_the_full_model_s(
    device: torch.device, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sirius.model.costs.LEAST_EXTENT", 16)
    settings: dict[str, Any] = {"draft": "resident", "window": window, "device": "cuda", "max_context": 64}
    answers = {}
    for cuda_graphs in (True, False):
        with offload_sirius.load(
            "synthetic:small?dtype=F32", cuda_graphs=cuda_graphs, progress=NoProgress(), **settings
        ) as engine:
            answers[cuda_graphs] = engine.generate([1, 2, 3], max_new_tokens=40, ignore_eos=True)
            full = engine.generate([1, 2, 3], mode="full", max_new_tokens=40, ignore_eos=True)
            assert answers[cuda_graphs].token_ids == full.token_ids
            captured = engine._streamed._captured
            assert (captured is not None and captured.num_recorded == 3) == cuda_graphs, "of 16, 32 and 64 slots"
    assert answers[True].passes == answers[False].passes
