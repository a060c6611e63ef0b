"""How layers reach the device: which memory they wait in, and by which copier each comes. Joins `weights`; knows no model.

On a machine without a GPU the device is the host and a layer is copied by its tier. A device with memory of its own has an
uplink: its layers wait in pinned memory, and those that could not be pinned, or are on disk, take a longer route.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload_sirius import machine
from offload_sirius.engine.placement import Placement
from offload_sirius.engine.progress import Progress
from offload_sirius.trace import Tracer
from offload_sirius.units import format_size
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import Copier, DiskCopier, HostCopier, PacedCopier, TieredCopier
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.plan import NUM_STAGING, Plan, as_flag
from offload_sirius.weights.uploads import COPY_THREADS, ChunkRoute, DiskRoute, PinnedRoute, Route, Uplink, UplinkCopier
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Arenas:
    """Host memory of a model's layers."""

    layers: HostStore
    """Those that stay there."""
    staging: HostStore
    """Buffers through which the others come to a device with memory of its own; empty where there are none or no need."""
    uploaded: bool
    """Whether the device has memory of its own."""

    @property
    def on_the_way(self) -> list[LayerBuffer]:
        """What residents pass through while loading, before `layers` is filled: may be a part of it. Empty where nothing is
        uploaded."""
        return (self.staging.buffers or self.layers.buffers[:NUM_STAGING]) if self.uploaded else []

    def close(self) -> None:
        """Unpin. Nothing may be on its way."""
        self.layers.close()
        self.staging.close()


@dataclass(frozen=True)
class Origins:
    """Where layers come from."""

    checkpoint: Checkpoint
    readers: ReaderPool
    arenas: Arenas


def make_arenas(placement: Placement, spec: ModelSpec, uplink: Uplink | None, num_shared_buffers: int | None) -> Arenas:
    """Map host memory for the plan, and begin to pin it where there is an uplink."""
    plan = placement.plan

    def arena(layers: tuple[int, ...], num_buffers: int | None = None) -> HostStore:
        return HostStore(
            layers,
            spec,
            placement.layout,
            placement.dtype,
            registrar=uplink,
            node=numa_node_near(placement.device),
            num_buffers=num_buffers,
        )

    layers = arena(plan.host_layers, num_shared_buffers)
    if uplink is None:
        return Arenas(layers=layers, staging=arena(()), uploaded=False)
    # Layers from disk pass through buffers of their own. Residents do so once, and may use the arena before it is filled.
    own = plan.disk_layers or len(layers.buffers) < NUM_STAGING
    return Arenas(layers=layers, staging=arena(tuple(range(NUM_STAGING)) if own else ()), uploaded=True)


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
        copier = UplinkCopier(_routes(origins, plan, uplink, progress), uplink)
    return copier if link_gbps is None else PacedCopier(copier, link_gbps * 1e9, tracer)


def _tiers(origins: Origins, plan: Plan, tracer: Tracer | None) -> Copier:
    from_host = HostCopier(origins.arenas.layers, tracer)
    from_disk = DiskCopier(origins.checkpoint, origins.readers, tracer)
    return TieredCopier(dict.fromkeys(plan.host_layers, from_host) | dict.fromkeys(plan.disk_layers, from_disk))


def _routes(origins: Origins, plan: Plan, uplink: Uplink, progress: Progress) -> dict[int, Route]:
    store = origins.arenas.layers
    pinned = [layer for layer in plan.host_layers if store.is_pinned(layer)]
    pageable = [layer for layer in plan.host_layers if not store.is_pinned(layer)]
    routes: dict[int, Route] = {}
    if pinned:
        routes |= dict.fromkeys(pinned, PinnedRoute(store, pinned, uplink))
    if pageable:
        chunks = ChunkRoute(store, pageable, uplink)
        routes |= dict.fromkeys(pageable, chunks)
        progress.warn(_pageable_warning(store, chunks))
    if plan.disk_layers:
        from_disk = DiskRoute(origins.checkpoint, origins.readers, uplink, origins.arenas.staging.buffers)
        routes |= dict.fromkeys(plan.disk_layers, from_disk)
    return routes


def _pageable_warning(store: HostStore, chunks: ChunkRoute) -> str:
    report, limit = store.pin_report(), machine.memlock_limit_nbytes()
    return (
        f"{format_size(report.pageable_nbytes)} of {format_size(store.nbytes)} of host memory could not be pinned "
        f"({report.reason}): these layers are copied twice, at {chunks.bytes_per_second / 1e9:.1f} GB/s at most, on "
        f"{COPY_THREADS} threads; raise `ulimit -l` (now {'unlimited' if limit is None else as_flag(limit)}) or give a smaller "
        "--host-memory"
    )


def uplink_to(device: torch.device) -> Uplink | None:
    """The way to a device with memory of its own; None where it is the host."""
    if device.type != "cuda":
        return None
    from offload_sirius.weights.cuda import CudaUplink

    return CudaUplink(device)


def numa_node_near(device: torch.device) -> int | None:
    """The node of the host's memory nearest to a device; None on a machine with one node, or where it is not known."""
    if device.type != "cuda" or machine.num_numa_nodes() < 2:
        return None
    from offload_sirius.weights.cuda import numa_node_of

    return numa_node_of(device)
