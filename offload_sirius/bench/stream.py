"""Full passes of a model through the real engine: how long they take, against the link's own time for their bytes, and which
layer was waited for. A pass is one token of the decode loop: head, sampling and detokenisation are in its time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from offload_sirius.bench.link import copy_rate, pinned_upload_bytes_per_second
from offload_sirius.bench.spread import NUM_REPEATS, Spread, spread_of
from offload_sirius.bench.ways import ONE_THREAD, WALK_NBYTES, host_ways
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine, Model, NoProgress, Progress
from offload_sirius.engine.placement import place
from offload_sirius.errors import ConfigError
from offload_sirius.trace import Tracer
from offload_sirius.units import MIB
from offload_sirius.weights.disk_rate import QUEUES, SAMPLE_NBYTES, read_seconds
from offload_sirius.weights.layout import PARTS
from offload_sirius.weights.pieces import stored_part_nbytes
from offload_sirius.weights.plan import MAX_SLOTS, MIN_SLOTS
from offload_sirius_loaders.checkpoint import Checkpoint

PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)
"""Token ids that every model has."""

NUM_WARMUPS = 2
"""Passes before those that count: the prompt's, and the first step's."""

COPY_NBYTES = 64 * MIB
"""One copy, where the rate of memory is measured: about a layer."""

Tier = Literal["resident", "host", "disk"]


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What one of the links that a pass needs could do at best."""

    what: str
    bytes_per_second: float
    nbytes: int
    """What a pass moves over it."""

    @property
    def seconds(self) -> float:
        """The shortest a pass can take."""
        return self.nbytes / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class LayerGap:
    """How long the computation waited for a layer in a pass, on average."""

    layer: int
    tier: Tier
    seconds: float


@dataclass(frozen=True, kw_only=True)
class StreamReport:
    """Everything `bench stream` measures."""

    model: str
    device: str
    num_slots: int
    pass_nbytes: int
    """Bytes of layers that crossed the link in a pass, by the counters."""
    pinned_nbytes: int
    """Host memory of layers that the device reads directly."""
    pageable_nbytes: int
    """Host memory of layers that it does not: all of it on a CPU."""
    seconds: Spread
    """Of a pass."""
    all_seconds: tuple[float, ...]
    ceilings: tuple[Ceiling, ...]
    """Links that work at the same time: the slowest bounds a pass."""
    copy_busy_share: float
    """Share of the passes' time in which the link carried something."""
    layers: tuple[LayerGap, ...]

    @property
    def bound(self) -> Ceiling:
        """The link that takes longest."""
        return max(self.ceilings, key=lambda ceiling: ceiling.seconds)

    @property
    def link_share(self) -> float:
        """How much of the link's best rate was used. A little above 1 where the passes that count began with fuller slots than
        they left: at most the slots' share of all their layers."""
        return self.bound.seconds / self.seconds.median

    @property
    def gap_seconds(self) -> float:
        """Waiting in a pass, all layers together."""
        return sum(layer.seconds for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        own = {"bound": self.bound.what, "link_share": self.link_share, "gap_seconds": self.gap_seconds}
        return asdict(self) | own | {"gbytes_per_second": self.pass_nbytes / self.seconds.median / 1e9}


def streaming_config(model: Model, config: EngineConfig, *, num_passes: int, all_streamed: bool) -> EngineConfig:
    """The settings for measuring passes: the plan of full mode, no more context than they need, and (all_streamed) no resident
    layers.

    Raises ConfigError where nothing would be streamed, or the model has no room for so many passes.
    """
    room = model.spec.max_positions - len(PROMPT) - NUM_WARMUPS
    if num_passes > room:
        raise ConfigError(f"--passes is {num_passes}; {model.spec.name} has room for {room} after prompt and warm-up")
    config = replace(config, max_context=len(PROMPT) + NUM_WARMUPS + num_passes, decoding=DecodingConfig(mode="full"))
    if all_streamed:
        config = without_residents(model, config)
    if not place(model.checkpoint, config).plan.streamed_layers:
        raise ConfigError(
            f"all {model.spec.num_layers} layers of {model.spec.name} would be resident, and nothing to measure; "
            "leave out --device-memory, or give a model with more layers"
        )
    return config


def measure_stream(
    engine: Engine, tracer: Tracer, num_passes: int = NUM_REPEATS, progress: Progress | None = None
) -> StreamReport:
    """Measure an engine that streams, told of by the tracer it was built with."""
    passes = run_passes(engine, num_passes, progress or NoProgress())
    ceilings = _ceilings(engine)
    began, ended = passes.moments[0], passes.moments[-1]
    result = passes.result
    return StreamReport(
        model=engine.spec.name,
        device=str(result.plan["device"]),
        num_slots=engine.plan.num_slots,
        pass_nbytes=result.link.bytes.full // result.passes.full,
        pinned_nbytes=result.memory.pinned_bytes,
        pageable_nbytes=result.memory.pageable_bytes,
        seconds=spread_of(passes.seconds),
        all_seconds=passes.seconds,
        ceilings=ceilings,
        copy_busy_share=tracer.busy_share("copy", began, ended),
        layers=_gaps(engine, tracer, began, ended, num_passes),
    )


@dataclass(frozen=True, kw_only=True)
class RunPasses:
    """Passes that count, one behind the other."""

    moments: tuple[float, ...]
    """Seconds of time.perf_counter at which each began, and the last one ended."""
    result: Generation

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each pass."""
        return tuple(after - before for before, after in pairwise(self.moments))


def run_passes(engine: Engine, num_passes: int, progress: Progress) -> RunPasses:
    """Passes of the full model, one token each, after those that warm up."""
    num_tokens, moments = NUM_WARMUPS + num_passes, []
    stream = engine.stream(PROMPT, mode="full", max_new_tokens=num_tokens, ignore_eos=True, reuse=False)
    progress.begin("passes", num_tokens * engine.plan.pass_nbytes)
    try:
        for piece in stream:
            if piece.token_id is not None:  # not the rest of the text that may come behind the last token
                moments.append(time.perf_counter())
                progress.advance(engine.plan.pass_nbytes)
    finally:
        progress.end()
    return RunPasses(moments=tuple(moments[NUM_WARMUPS - 1 :]), result=stream.result)


def pass_seconds(engine: Engine, num_passes: int) -> list[float]:
    """Seconds of each pass."""
    return list(run_passes(engine, num_passes, NoProgress()).seconds)


def checkpoint_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that a checkpoint's tensors are in."""
    return sorted({info.file for info in checkpoint.infos if info.file is not None})


def without_residents(model: Model, config: EngineConfig) -> EngineConfig:
    """The most slots at which no layer is resident."""
    plan = place(model.checkpoint, config).plan
    fixed = plan.device_nbytes - plan.device_bill["resident_layers"] - plan.device_bill["slots"]
    budgets = [replace(config, device_memory=str(fixed + slots * plan.layer_nbytes)) for slots in range(MIN_SLOTS, MAX_SLOTS + 1)]
    streamed = [budget for budget in budgets if not place(model.checkpoint, budget).plan.resident_layers]
    return streamed[-1] if streamed else budgets[0]


def _ceilings(engine: Engine) -> tuple[Ceiling, ...]:
    """Of every link that the engine's plan uses: measured now, or the set rate."""
    plan, found = engine.plan, []
    if plan.disk_layers:
        files, nbytes = checkpoint_files(engine.checkpoint), _stored_nbytes(engine.checkpoint, plan.disk_layers)
        found.append(Ceiling(what="plain reads of the files", bytes_per_second=_disk_bytes_per_second(files), nbytes=nbytes))
    if engine.config.link_gbps is not None:
        rate = engine.config.link_gbps * 1e9
        found.append(Ceiling(what="the emulated link's rate", bytes_per_second=rate, nbytes=plan.pass_nbytes))
    elif engine.device.type == "cuda":
        # The copies of the passes themselves may have been faster: a ceiling is above all that was seen.
        rate = max(pinned_upload_bytes_per_second(engine.device), engine.streamer.peak_bytes_per_second or 0.0)
        found.append(Ceiling(what="copies from pinned memory", bytes_per_second=rate, nbytes=plan.pass_nbytes))
    elif plan.host_layers:
        found.append(_memory_ceiling(len(plan.host_layers) * plan.layer_nbytes))
    return tuple(found)


def _memory_ceiling(nbytes: int) -> Ceiling:
    way = next(each for each in host_ways(WALK_NBYTES) if each.name == ONE_THREAD)
    rate = copy_rate(way, min(COPY_NBYTES, WALK_NBYTES)).bytes_per_second.median
    return Ceiling(what="memory copies by one thread", bytes_per_second=rate, nbytes=nbytes)


def _stored_nbytes(checkpoint: Checkpoint, layers: Sequence[int]) -> int:
    return sum(stored_part_nbytes(checkpoint, layer, part) for layer in layers for part in PARTS)


def _disk_bytes_per_second(files: list[Path]) -> float:
    nbytes = min(sum(file.stat().st_size for file in files), SAMPLE_NBYTES)
    return nbytes / min(read_seconds(files, nbytes, *queue) for queue in QUEUES)


def _gaps(engine: Engine, tracer: Tracer, began: float, ended: float, num_passes: int) -> tuple[LayerGap, ...]:
    """From the spans of waiting that lie in the time."""
    waited: dict[int, float] = defaultdict(float)
    for span in tracer.spans():
        if span.row == "wait" and began <= span.began < ended:
            waited[span.arguments["layer"]] += span.ended - span.began
    return tuple(
        LayerGap(layer=layer, tier=_tier(engine, layer), seconds=waited[layer] / num_passes)
        for layer in range(engine.spec.num_layers)
    )


def _tier(engine: Engine, layer: int) -> Tier:
    if layer in engine.plan.resident_layers:
        return "resident"
    return "host" if layer in engine.plan.host_layers else "disk"
