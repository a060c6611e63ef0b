"""The rates of this machine that predictions rest on, measured with the parts that will run: the model's own forward pass over
layers of random weights, the link's own copier, plain reads of the disk. Some seconds a type of weights.

A layer's time is taken apart by its size: what the smallest layers take is overhead, what a large one takes beyond is its bytes
(one token) or its arithmetic (many).
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from offload_sirius import machine
from offload_sirius.config import SamplingConfig
from offload_sirius.decode.sampling import Sampler
from offload_sirius.engine.link import uplink_to
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius.rates import ASSUMED, Rates
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import Copier, HostCopier
from offload_sirius.weights.disk_rate import measure_disk
from offload_sirius.weights.host import HostStore, allocate_bytes
from offload_sirius.weights.layout import PARTS, layer_layout
from offload_sirius.weights.uploads import ChunkRoute, PinnedRoute, Uplink, UplinkCopier
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

PROMPT_TOKENS = 256
"""Rows of the matmuls by which arithmetic is measured."""

NUM_SMALL_LAYERS = 8
STEP_REPEATS, PROMPT_REPEATS = 15, 5
"""Runs of which the median counts. A step of the large layer takes some ten milliseconds, a prompt up to a second."""

STEPS_BESIDE_COPIES = 40
"""Steps whose mean counts and not their median: who gets which core changes from one to the next, and a pass meets all of it."""

STEPS_AT_ONCE = 20
"""Steps of the smallest layers that are timed together: one takes a millisecond, too little to be timed alone."""

LARGE = ModelSpec(
    name="large",
    architecture="llama",
    num_layers=1,
    width=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    ffn_width=14336,
    vocab_size=256,
    max_positions=2 * PROMPT_TOKENS,
    norm_eps=1e-5,
    rope=RopeSpec(),
    layer_windows=(None,),
)
"""A layer of 218 million parameters: more than any cache holds, little enough for any machine."""

SMALL = replace(LARGE, name="small", width=64, num_heads=2, num_kv_heads=1, head_dim=32, ffn_width=64)
"""A layer that takes no longer than its calls."""


class RandomWeights:
    """Layers of random weights on a device. Satisfies the model's WeightSource."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        layout = layer_layout(spec, dtype.itemsize)
        self._layers = [
            LayerBuffer(allocate_bytes(layout.nbytes, device, "device"), spec, layout, dtype) for _ in range(spec.num_layers)
        ]
        for layer in self._layers:
            layer.storage.view(dtype).normal_(std=0.02)
        self.final_norm = torch.ones(spec.width, dtype=dtype, device=device)
        self.head = torch.zeros(spec.vocab_size, spec.width, dtype=dtype, device=device)
        self._table = torch.ones(spec.vocab_size, spec.width, dtype=dtype)
        self._device = device

    def embed(self, token_ids: Tensor) -> Tensor:
        """See WeightSource."""
        return self._table[token_ids].to(self._device)

    def attention(self, layer: int) -> LayerBuffer:
        """See WeightSource."""
        return self._layers[layer]

    def neurons(self, layer: int) -> LayerBuffer:
        """See WeightSource."""
        return self._layers[layer]

    def release(self, layer: int) -> None:
        """See WeightSource."""


def measure_rates(device: torch.device, dtype: torch.dtype, disk: Path, assumed: Rates, source: str) -> Rates:
    """Measure everything. assumed: for what cannot be; source: what is written beside the rest, `measured DATE`.

    disk: a file or folder on the disk to measure. Takes 0.5 GB of device memory in bfloat16 and as much of the host's, twice
    that in float32. Raises BudgetError, ConfigError.
    """
    torch.set_num_threads(machine.physical_cores())
    per_step, per_layer = _overheads(dtype, device)
    large = _model(LARGE, dtype, device)
    nbytes = layer_layout(LARGE, dtype.itemsize).nbytes
    step_seconds = seconds_of(lambda: _step(large), device)
    prompt_seconds = seconds_of(lambda: _prefill(large), device, PROMPT_REPEATS)
    link = _link_rates(large, step_seconds, dtype, device)
    flops = 2 * PROMPT_TOKENS * (nbytes // dtype.itemsize)
    measured = {
        "link_bytes_per_second": link[0],
        "disk_bytes_per_second": measure_disk(disk).bytes_per_second,
        "device_bytes_per_second": nbytes / (step_seconds - per_step - per_layer),
        "device_flops_per_second": flops / (prompt_seconds - per_step - per_layer),
        "layer_overhead_seconds": per_layer,
        "step_overhead_seconds": per_step,
    }
    if device.type == "cpu":
        measured |= {
            "compute_share_beside_copies": link[1],
            "copy_share_beside_computing": link[2],
            "compute_share_beside_readers": _share_beside_readers(large, step_seconds, device),
        }
    sources = {**dict.fromkeys(assumed.sources, ASSUMED), **dict.fromkeys(measured, source)}
    return replace(assumed, **measured, sources=sources)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = STEP_REPEATS) -> float:
    """Median seconds of a piece of work, the first run left out."""
    seconds = []
    for _ in range(repeats + 1):
        _synchronise(device)
        began = time.perf_counter()
        work()
        _synchronise(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _overheads(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Seconds of a step and of a layer that has next to nothing to compute."""
    few, many = _model(SMALL, dtype, device), _model(_with_layers(SMALL, 1 + NUM_SMALL_LAYERS), dtype, device)
    with_few = seconds_of(lambda: _steps(few), device) / STEPS_AT_ONCE
    with_many = seconds_of(lambda: _steps(many), device) / STEPS_AT_ONCE
    per_layer = max((with_many - with_few) / NUM_SMALL_LAYERS, 1e-9)
    return max(with_few - per_layer, 1e-9), per_layer


def _with_layers(spec: ModelSpec, num_layers: int) -> ModelSpec:
    return replace(spec, num_layers=num_layers, layer_windows=(None,) * num_layers)


def _model(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Transformer:
    cache = KVCache(spec, capacity=spec.max_positions, dtype=dtype, device=device)
    return Transformer(spec, RandomWeights(spec, dtype, device), cache)


def _step(model: Transformer) -> None:
    """A token of the decode loop: the pass, and the choice of the next."""
    model.cache.truncate(0)
    Sampler(SamplingConfig()).choose(model.step(torch.tensor([1]))[0], 1, [1])


def _steps(model: Transformer) -> None:
    for _ in range(STEPS_AT_ONCE):
        _step(model)


def _prefill(model: Transformer) -> None:
    model.cache.truncate(0)
    model.prefill(torch.arange(PROMPT_TOKENS) % LARGE.vocab_size)


def _share_beside_readers(model: Transformer, alone_seconds: float, device: torch.device) -> float:
    """Speed on one core less than all, as decoding goes while layers come from disk."""
    cores = machine.physical_cores()
    torch.set_num_threads(max(cores - 1, 1))
    try:
        return min(alone_seconds / seconds_of(lambda: _step(model), device), 1.0)
    finally:
        torch.set_num_threads(cores)


def _link_rates(model: Transformer, step_seconds: float, dtype: torch.dtype, device: torch.device) -> tuple[float, float, float]:
    """Bytes per second of the link alone; the shares of speed that are left to computing and to copies while both run."""
    layout = layer_layout(LARGE, dtype.itemsize)
    uplink = uplink_to(device)
    host = HostStore(range(1), LARGE, layout, dtype, registrar=uplink)
    slot = LayerBuffer(allocate_bytes(layout.nbytes, device, "device"), LARGE, layout, dtype)
    copier = _copier(host, uplink)
    try:
        copy_seconds = seconds_of(lambda: _copy(copier, slot), device)
        with _copying(copier, slot):
            nbytes, began = copier.nbytes_copied, time.perf_counter()
            for _ in range(STEPS_BESIDE_COPIES):
                _step(model)
            _synchronise(device)
            seconds = time.perf_counter() - began
            rate = (copier.nbytes_copied - nbytes) / seconds
        alone = layout.nbytes / copy_seconds
        return alone, min(step_seconds * STEPS_BESIDE_COPIES / seconds, 1.0), min(rate / alone, 1.0)
    finally:
        copier.close()
        host.close()


def _copier(host: HostStore, uplink: Uplink | None) -> Copier:
    if uplink is None:
        return HostCopier(host)
    route = (PinnedRoute if host.is_pinned(0) else ChunkRoute)(host, [0], uplink)
    return UplinkCopier({0: route}, uplink)


def _copy(copier: Copier, slot: LayerBuffer) -> None:
    for transfer in [copier.start(0, part, slot) for part in PARTS]:
        transfer.wait()


@contextmanager
def _copying(copier: Copier, slot: LayerBuffer) -> Iterator[None]:
    """Copies follow each other without pause while the block runs."""
    over = threading.Event()

    def copy() -> None:
        while not over.is_set():
            _copy(copier, slot)

    thread = threading.Thread(target=copy, name="copies")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
