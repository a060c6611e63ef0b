"""The rates of this machine that predictions rest on, measured with the parts that will run: the model's own forward pass over
layers of random weights, the link's own copier, plain reads of the disk. About a minute a type of weights.

A layer's time is taken apart by its size: what the smallest layers take is overhead, what large ones take beyond is their bytes
(one token) or their arithmetic (many). Quantised layers are measured in the same way, their overhead being that of plain ones.
A GPU takes less for a layer than the host takes to launch it: there bytes and arithmetic are those of products that are queued.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius import machine
from offload_sirius.config import SamplingConfig
from offload_sirius.decode.sampling import Sampler
from offload_sirius.engine.link import uplink_to
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius.quantization import DEFAULT_GROUPS, KINDS, Kind, WeightFormat
from offload_sirius.rates import ASSUMED, QuantizedRates, Rates
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import Copier, HostCopier, Transfer
from offload_sirius.weights.disk_rate import measure_disk
from offload_sirius.weights.host import HostStore, allocate_bytes
from offload_sirius.weights.layout import PARTS, layer_layout
from offload_sirius.weights.plan import MIN_SLOTS
from offload_sirius.weights.uploads import ChunkRoute, Chunks, PinnedRoute, Route, Uplink, UplinkCopier
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

PROMPT_TOKENS = 256
"""Rows of the matmuls by which arithmetic is measured."""

FEW_TOKENS = 16
"""Tokens beside which the arithmetic of quantised weights is measured: as a window may have."""

QUANTIZED_SCALE = 1e-3
"""Of random integers, so that no number grows beyond what a type holds."""

NUM_SMALL_LAYERS = 8
STEP_REPEATS, PROMPT_REPEATS = 15, 5
"""Runs of which the median counts. A step of the large layer takes some ten milliseconds, a prompt up to a second."""

ROUNDS = 3
"""Of everything, some ten seconds apart: what a machine does beside lasts longer than one measurement."""

STEPS_BESIDE_COPIES = 20
"""Steps whose mean counts and not their median: who gets which core changes from one to the next, and a pass meets all of it."""

SMALLEST_SHARE = 0.05
"""Noise can say that copies and computing stop each other altogether."""

STEPS_AT_ONCE = 20
"""Steps of the smallest layers that are timed together: one takes a millisecond, too little to be timed alone."""

PRODUCT_ROWS, PRODUCTS_AT_ONCE = 1 << 16, 8
"""Of matrices that no cache of a GPU holds, half a gigabyte each in bfloat16, and products with them that are queued together."""

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
"""A layer of 218 million parameters: so wide that products take nearly all of its time, little enough for any machine."""

LARGE_NBYTES = 800 * 10**6
"""Of the layers that a step goes through, at least: more than the caches of nearly all processors hold. Servers have some hundred
megabytes of them, out of which one layer was seen to come a tenth faster than two."""

RING = replace(LARGE, name="ring", num_layers=4, width=2048, ffn_width=8192, layer_windows=(None,) * 4)
"""Layers that are copied while others are computed on, as a ring of slots does it: each of another place, one at each second
release. (One large copy over and over takes less from computing than these: half as much was seen.)"""

SMALL = replace(LARGE, name="small", width=64, num_heads=2, num_kv_heads=1, head_dim=32, ffn_width=64)
"""A layer that takes no longer than its calls."""


class RandomWeights:
    """Layers of random weights on a device. Satisfies the model's WeightSource."""

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, weight_format: WeightFormat | None = None
    ) -> None:
        layout = layer_layout(spec, dtype.itemsize, 0, weight_format)
        self._layers = [
            LayerBuffer(allocate_bytes(layout.nbytes, device, "device"), spec, layout, dtype) for _ in range(spec.num_layers)
        ]
        for layer in self._layers:
            layer.storage.view(dtype).normal_(std=0.02)
            for matrix in (layer.qkv, layer.output, layer.gate, layer.up, layer.down):
                if isinstance(matrix, QuantizedRows):
                    matrix.rows.random_(256)
                    matrix.scales.fill_(QUANTIZED_SCALE)
                    matrix.outlier_rests.zero_()  # any bits may be no number
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


def measure_rates(
    device: torch.device, dtype: torch.dtype, disk: Path, assumed: Rates, source: str, rounds: int = ROUNDS
) -> Rates:
    """Measure everything. assumed: for what cannot be; source: what is written beside the rest, `measured DATE`.

    disk: a file or folder on the disk to measure. rounds: of which medians count. Takes 2 GB of memory in bfloat16, twice that
    in float32. Raises BudgetError, ConfigError.
    """
    torch.set_num_threads(machine.physical_cores())
    disk_rate = measure_disk(disk).bytes_per_second
    plain = _medians([_compute_rates(dtype, device) | _link_rates(dtype, device) for _ in range(rounds)])
    measured = plain | {"disk_bytes_per_second": disk_rate}
    sources = {**dict.fromkeys(assumed.sources, ASSUMED), **dict.fromkeys(measured, source)}
    rates = replace(assumed, **measured, sources=sources)  # type: ignore[arg-type]
    return replace(rates, quantized={kind: measure_quantized(kind, device, dtype, rates, source, rounds) for kind in KINDS})


def measure_quantized(
    kind: Kind, device: torch.device, dtype: torch.dtype, plain: Rates, source: str, rounds: int = ROUNDS
) -> QuantizedRates:
    """The rates of quantised weights of a kind, in its usual groups. plain: of weights that are not, measured before."""
    form = WeightFormat(kind=kind, group=DEFAULT_GROUPS[kind])
    return QuantizedRates(**_medians([_quantized_rates(form, dtype, device, plain) for _ in range(rounds)]), source=source)


def _quantized_rates(form: WeightFormat, dtype: torch.dtype, device: torch.device, plain: Rates) -> dict[str, float]:
    large = LargeLayers(dtype, device, form)
    flops = 2 * large.layer_nbytes / (form.bits_per_weight / 8)
    step_seconds, few_seconds = large.step_seconds(), large.step_seconds(FEW_TOKENS)
    products_seconds = PROMPT_TOKENS * flops / plain.device_flops_per_second
    per_step, per_layer = plain.step_overhead_seconds, plain.layer_overhead_seconds
    overhead = per_step + per_layer
    return {
        "bytes_per_second": large.nbytes / _beyond(per_step + large.num_layers * per_layer, step_seconds),
        "flops_per_second": (FEW_TOKENS - 1) * large.num_layers * flops / _left(few_seconds, step_seconds),
        "unpacking_bytes_per_second": large.layer_nbytes / _left(large.prompt_seconds(), overhead + products_seconds),
    }


class LargeLayers:
    """Random layers of which a pass reads more than caches hold, as a step goes through them; a prompt goes through the first."""

    def __init__(self, dtype: torch.dtype, device: torch.device, form: WeightFormat | None = None) -> None:
        self.layer_nbytes = layer_layout(LARGE, dtype.itemsize, 0, form).nbytes
        self.num_layers = math.ceil(LARGE_NBYTES / self.layer_nbytes)
        spec = _with_layers(LARGE, self.num_layers)
        weights = RandomWeights(spec, dtype, device, form)
        self._layers, self._first = (_model_of(each, weights, dtype, device) for each in (spec, LARGE))
        self._device = device

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return self.num_layers * self.layer_nbytes

    def step_seconds(self, num_tokens: int = 1) -> float:
        """Of a step, through all layers."""
        return seconds_of(partial(_step, self._layers, num_tokens), self._device)

    def prompt_seconds(self) -> float:
        """Of a prompt, through one layer: arithmetic takes so long that it matters little where weights come from."""
        return seconds_of(partial(_prefill, self._first), self._device, PROMPT_REPEATS)


def _left(seconds: float, rest: float) -> float:
    """What a piece of work takes beside the rest of it: at least a twentieth, as noise can say that it takes nothing."""
    return max(seconds - rest, SMALLEST_SHARE * seconds)


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _compute_rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    per_step, per_layer = _overheads(dtype, device)
    large = LargeLayers(dtype, device)
    step_seconds, prompt_seconds = large.step_seconds(), large.prompt_seconds()
    flops = 2 * PROMPT_TOKENS * (large.layer_nbytes // dtype.itemsize)
    rates = {
        "device_bytes_per_second": large.nbytes / _beyond(per_step + large.num_layers * per_layer, step_seconds),
        "device_flops_per_second": flops / _beyond(per_step + per_layer, prompt_seconds),
        "layer_overhead_seconds": per_layer,
        "step_overhead_seconds": per_step,
    }
    if device.type == "cuda":
        return rates | product_rates(dtype, device)
    return rates | {"compute_share_beside_readers": _share_beside_readers(large, step_seconds)}


def product_rates(dtype: torch.dtype, device: torch.device, rows: int = PRODUCT_ROWS) -> dict[str, float]:
    """Of products alone, many of them queued: a step of one layer takes a fast GPU less than the host takes to launch it."""
    matrices = [torch.full((rows, LARGE.width), 0.01, dtype=dtype, device=device) for _ in range(2)]

    def product_seconds(num_tokens: int) -> float:
        x = torch.ones(num_tokens, LARGE.width, dtype=dtype, device=device)
        turns = matrices * (PRODUCTS_AT_ONCE // 2)
        return seconds_of(lambda: [functional.linear(x, matrix) for matrix in turns], device) / len(turns)

    numel = matrices[0].numel()
    return {
        "device_bytes_per_second": numel * dtype.itemsize / product_seconds(1),
        "device_flops_per_second": 2 * PROMPT_TOKENS * numel / product_seconds(PROMPT_TOKENS),
    }


def _beyond(overhead: float, seconds: float) -> float:
    """What a large layer takes beyond its overhead: at least half of its time. More overhead than that in so large a layer is
    something else that the machine did while it was measured."""
    return max(seconds - overhead, seconds / 2)


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
    return _model_of(spec, RandomWeights(spec, dtype, device), dtype, device)


def _model_of(spec: ModelSpec, weights: RandomWeights, dtype: torch.dtype, device: torch.device) -> Transformer:
    return Transformer(spec, weights, KVCache(spec, capacity=spec.max_positions, dtype=dtype, device=device))


def _step(model: Transformer, num_tokens: int = 1) -> None:
    """A token of the decode loop, or a few: the pass, and the choice of the next."""
    model.cache.truncate(0)
    Sampler(SamplingConfig()).choose(model.step(torch.ones(num_tokens, dtype=torch.int64))[0], 1, [1])


def _steps(model: Transformer) -> None:
    for _ in range(STEPS_AT_ONCE):
        _step(model)


def _prefill(model: Transformer) -> None:
    model.cache.truncate(0)
    model.prefill(torch.arange(PROMPT_TOKENS) % LARGE.vocab_size)


def _share_beside_readers(large: LargeLayers, alone_seconds: float) -> float:
    """Speed on one core less than all, as decoding goes while layers come from disk."""
    cores = machine.physical_cores()
    torch.set_num_threads(max(cores - 1, 1))
    try:
        return min(alone_seconds / large.step_seconds(), 1.0)
    finally:
        torch.set_num_threads(cores)


class StreamedWeights(RandomWeights):
    """Every second layer that is released has another one copied into a slot, as the streamer would."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device, copies: LayerCopies) -> None:
        super().__init__(spec, dtype, device)
        self._copies = copies

    def release(self, layer: int) -> None:
        """See WeightSource."""
        if layer % 2:
            self._copies.start_next()


class LayerCopies:
    """The link with layers in host memory behind it and slots before it."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        layout = layer_layout(spec, dtype.itemsize)
        self._num_layers = spec.num_layers
        uplink = uplink_to(device)
        self._chunks = None if uplink is None else Chunks(uplink)
        self._host = HostStore(range(spec.num_layers), spec, layout, dtype, registrar=uplink)
        self._slots = [
            LayerBuffer(allocate_bytes(layout.nbytes, device, "device"), spec, layout, dtype) for _ in range(MIN_SLOTS)
        ]
        for buffer in self._host.buffers:
            buffer.storage.fill_(1)  # pages that were never written are all the same one
        self._copier = _copier(self._host, uplink, self._chunks)
        self._under_way: deque[Transfer] = deque()
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(buffer.storage.numel() for buffer in self._host.buffers)

    @property
    def busy_seconds(self) -> float:
        """Time in which something was copied."""
        return self._copier.busy_seconds

    def start_next(self) -> None:
        """Begin to copy the next layer into the next slot."""
        slot = self._slots[self._next % len(self._slots)]
        self._under_way.extend(self._copier.start(self._next % self._num_layers, part, slot) for part in PARTS)
        self._next += 1

    def wait(self) -> None:
        """Until all is copied."""
        while self._under_way:
            self._under_way.popleft().wait()

    def copy_all(self) -> None:
        """Every layer once."""
        for _ in range(self._num_layers):
            self.start_next()
        self.wait()

    def close(self) -> None:
        """End the copier, unpin."""
        self._copier.close()
        self._host.close()
        if self._chunks is not None:
            self._chunks.close()


def _link_rates(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The link alone, and where it takes the CPU's own memory and cores, what it leaves to computing and computing to it."""
    copies = LayerCopies(RING, dtype, device)
    try:
        copy_seconds = seconds_of(copies.copy_all, device)
        link = {"link_bytes_per_second": copies.nbytes / copy_seconds}
        return link if device.type == "cuda" else link | _shares(copies, copy_seconds / copies.nbytes, dtype, device)
    finally:
        copies.close()


def _shares(copies: LayerCopies, seconds_per_byte: float, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """A step alone, then with copies beside it; what each takes longer, it has lost while both ran."""
    alone = seconds_of(partial(_step, _model(RING, dtype, device)), device)
    beside = _model_of(RING, StreamedWeights(RING, dtype, device, copies), dtype, device)
    copied, began = copies.busy_seconds, time.perf_counter()
    for _ in range(STEPS_BESIDE_COPIES):
        _step(beside)
    computing = (time.perf_counter() - began) / STEPS_BESIDE_COPIES
    copies.wait()
    copying = (copies.busy_seconds - copied) / STEPS_BESIDE_COPIES
    copying_alone = copies.nbytes / 2 * seconds_per_byte
    together = min(computing, copying)
    return {
        "compute_share_beside_copies": _as_share(1 - (computing - alone) / together),
        "copy_share_beside_computing": _as_share(1 - (copying - copying_alone) / together),
    }


def _as_share(found: float) -> float:
    return min(max(found, SMALLEST_SHARE), 1.0)


def _copier(host: HostStore, uplink: Uplink | None, chunks: Chunks | None) -> Copier:
    if uplink is None or chunks is None:
        return HostCopier(host)
    layers = range(len(host.buffers))
    all_pinned = host.pin_report().reason is None
    route: Route = PinnedRoute(host, layers, uplink) if all_pinned else ChunkRoute(host, layers, chunks)
    return UplinkCopier(dict.fromkeys(layers, route), uplink)
