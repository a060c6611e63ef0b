"""How layers reach the device: which memory they wait in, and by which copier each comes. Joins `weights`; knows no model.

On a machine without a GPU the device is the host and a layer is copied by its tier. A device with memory of its own has an
uplink: its layers wait in pinned memory, and those that could not be pinned, or are on disk, take a longer route.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from offload_sirius import machine
from offload_sirius.engine.placement import Placement
from offload_sirius.engine.progress import Progress
from offload_sirius.trace import Tracer
from offload_sirius.units import format_size
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import Copier, DiskCopier, HostCopier, PacedCopier, TieredCopier
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.embedding import Send
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.kept import KeptStore
from offload_sirius.weights.pinning import PinReport
from offload_sirius.weights.plan import NUM_STAGING, Plan, as_flag
from offload_sirius.weights.uploads import ChunkRoute, Chunks, DiskRoute, PinnedRoute, Route, SliceRoute, Uplink, UplinkCopier
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Arenas:
    """Host memory of a model's layers."""

    layers: HostStore
    """Those that stay there."""
    staging: HostStore
    """Buffers through which the others come to a device with memory of its own; empty where there are none or no need."""
    chunks: Chunks | None
    """What memory passes through that cannot be pinned; None where the device is the host."""
    kept: KeptStore
    """Neurons that draft steps keep, gathered; empty where they keep no fixed set, or there is no room."""

    @property
    def on_the_way(self) -> list[LayerBuffer]:
        """What residents pass through while loading, before `layers` is filled: may be a part of it. Empty where nothing is
        uploaded."""
        return (self.staging.buffers or self.layers.buffers[:NUM_STAGING]) if self.chunks is not None else []

    def report(self) -> PinReport:
        """What could be pinned, of all layers' memory; blocks until that is known."""
        return self.layers.pin_report() + self.staging.pin_report() + self.kept.pin_report()

    def give_back_unused(self, plan: Plan) -> None:
        """What was needed for loading only: staging where nothing comes from disk, chunks where all else is pinned."""
        if not plan.disk_layers:
            self.staging.close()
        if self.chunks is not None and self.report().reason is None:
            self.chunks.close()

    def close(self) -> None:
        """Unpin. Nothing may be on its way."""
        self.layers.close()
        self.staging.close()
        self.kept.close()
        if self.chunks is not None:
            self.chunks.close()


@dataclass(frozen=True)
class Origins:
    """Where layers come from."""

    checkpoint: Checkpoint
    readers: ReaderPool
    arenas: Arenas


def make_arenas(placement: Placement, spec: ModelSpec, uplink: Uplink | None) -> Arenas:
    """Map host memory for the plan, and begin to pin it where there is an uplink."""
    plan = placement.plan

    def arena(layers: tuple[int, ...], num_buffers: int, *, of_any_layer: bool = False) -> HostStore:
        return HostStore(
            layers,
            spec,
            placement.layout.staging if of_any_layer else placement.layout,
            placement.dtype,
            registrar=uplink,
            node=numa_node_near(placement.device),
            num_buffers=num_buffers,
            of_any_layer=of_any_layer,
        )

    def kept() -> KeptStore:
        node = numa_node_near(placement.device)
        return KeptStore(plan.kept_layers, placement.layout, placement.dtype, registrar=uplink, node=node)

    if uplink is None:
        layers = arena(plan.host_layers, plan.num_host_buffers)
        return Arenas(layers=layers, staging=arena((), 0), chunks=None, kept=kept())
    with ExitStack() as opened:  # memory that runs out half-way must not stay registered
        # Chunks first: where a limit ends pinning, they are what the rest depends on.
        chunks = Chunks(uplink)
        opened.callback(chunks.close)
        chunks.report  # noqa: B018  waits
        layers = arena(plan.host_layers, plan.num_host_buffers)
        opened.callback(layers.close)
        # Layers from disk pass through buffers of their own. Residents do so once, and may use the arena before it is filled, but
        # where layers differ, as one of another may be too small.
        has_own = plan.disk_layers or len(layers.buffers) < NUM_STAGING or placement.layout.by_layer
        own = NUM_STAGING if has_own else 0
        staging = arena(tuple(range(own)), own, of_any_layer=True)
        opened.callback(staging.close)
        arenas = Arenas(layers=layers, staging=staging, chunks=chunks, kept=kept())
        opened.pop_all()
    return arenas


def make_link(
    origins: Origins, plan: Plan, uplink: Uplink | None, link_gbps: float | None, progress: Progress, tracer: Tracer | None
) -> Copier | None:
    """What the streamer copies with, no faster than link_gbps where that is given; None where nothing is streamed."""
    if not plan.streamed_layers:
        return None
    # Of an emulated link only the pace is drawn, not the copying that stands for it.
    inner_tracer = tracer if link_gbps is None else None
    if uplink is None:
        copier = _tiers(origins, plan, inner_tracer)
    else:
        uplink.draw_on(inner_tracer)
        slices = SliceRoute(origins.arenas.layers, origins.arenas.kept, uplink)
        copier = UplinkCopier(_routes(origins, plan, uplink, progress), uplink, slices)
    return copier if link_gbps is None else PacedCopier(copier, link_gbps * 1e9, tracer)


def _tiers(origins: Origins, plan: Plan, tracer: Tracer | None) -> Copier:
    from_host = HostCopier(origins.arenas.layers, origins.arenas.kept, tracer)
    from_disk = DiskCopier(origins.checkpoint, origins.readers, tracer)
    return TieredCopier(dict.fromkeys(plan.host_layers, from_host) | dict.fromkeys(plan.disk_layers, from_disk), from_host)


def _routes(origins: Origins, plan: Plan, uplink: Uplink, progress: Progress) -> dict[int, Route]:
    arenas, chunks = origins.arenas, origins.arenas.chunks
    assert chunks is not None
    pinned = [layer for layer in plan.host_layers if arenas.layers.is_pinned(layer)]
    pageable = [layer for layer in plan.host_layers if not arenas.layers.is_pinned(layer)]
    routes: dict[int, Route] = {}
    if pinned:
        routes |= dict.fromkeys(pinned, PinnedRoute(arenas.layers, pinned, uplink))
    if pageable:
        routes |= dict.fromkeys(pageable, ChunkRoute(arenas.layers, pageable, chunks))
    if plan.disk_layers:
        way = uplink if arenas.staging.pin_report().reason is None else chunks
        routes |= dict.fromkeys(plan.disk_layers, DiskRoute(origins.checkpoint, origins.readers, way, arenas.staging.buffers))
    if arenas.report().reason is not None:
        progress.warn(_pageable_warning(arenas, chunks))
    return routes


def _pageable_warning(arenas: Arenas, chunks: Chunks) -> str:
    report, limit = arenas.report(), machine.memlock_limit_nbytes()
    source = (arenas.layers.buffers or arenas.staging.buffers)[0].storage
    total = format_size(report.pinned_nbytes + report.pageable_nbytes)
    driver = "," if chunks.report.reason is None else ", and a third time by the driver,"
    rate = f"{chunks.measure(source) / 1e9:.1f} GB/s"
    now = "unlimited" if limit is None else as_flag(limit)
    return (
        f"{format_size(report.pageable_nbytes)} of {total} of host memory could not be pinned ({report.reason}): what passes "
        f"through it is copied twice{driver} at {rate} at most; raise `ulimit -l` (now {now}) or give a smaller --host-memory"
    )


def uplink_to(device: torch.device) -> Uplink | None:
    """The way to a device with memory of its own; None where it is the host."""
    if device.type != "cuda":
        return None
    from offload_sirius.weights.cuda import CudaUplink

    return CudaUplink(device)


def sender_to(device: torch.device) -> Send:
    """The way of a few rows to the device that computes."""
    if device.type != "cuda":
        return partial(Tensor.to, device=device)
    from offload_sirius.weights.cuda import sent

    return partial(sent, device=device)


def numa_node_near(device: torch.device) -> int | None:
    """The node of the host's memory nearest to a device; None on a machine with one node, or where it is not known."""
    if device.type != "cuda" or machine.num_numa_nodes() < 2:
        return None
    from offload_sirius.weights.cuda import numa_node_of

    return numa_node_of(device)
