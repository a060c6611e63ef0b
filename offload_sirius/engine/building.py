"""Where the rooms are joined. `build` reads as the way of a weight: disk -> host -> device -> matmul."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import torch

from offload_sirius.cache import cache_folder
from offload_sirius.config import EngineConfig
from offload_sirius.engine.engine import Engine
from offload_sirius.engine.opened import Model
from offload_sirius.engine.placement import Placement, memory_errors, place
from offload_sirius.engine.progress import Progress
from offload_sirius.errors import ConfigError
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius.weights.copiers import Copier, DiskCopier, HostCopier, PacedCopier, TieredCopier
from offload_sirius.weights.device import DeviceStore
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.embedding import DiskEmbedding, Embedding, TableEmbedding
from offload_sirius.weights.host import HostStore
from offload_sirius.weights.load import Loader
from offload_sirius.weights.pieces import load_nbytes
from offload_sirius.weights.plan import NUM_STAGING
from offload_sirius.weights.streamer import WeightStreamer
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.writer import write_checkpoint


def build(model: Model, config: EngineConfig, progress: Progress) -> Engine:
    """Plan where the weights go, bring them there, and join everything that a pass needs."""
    began = time.perf_counter()
    placement = place(model.checkpoint, config)
    checkpoint = _on_disk(model.checkpoint, progress) if placement.plan.disk_layers else model.checkpoint
    with memory_errors(placement.plan), ExitStack() as stores:
        joined = _join(checkpoint, placement, config, progress, stores)
        stores.callback(checkpoint.close)
        closing = stores.pop_all()
    streamer, transformer, readers, nbytes = joined
    return Engine(
        model=model,
        checkpoint=checkpoint,
        config=config,
        placement=placement,
        transformer=transformer,
        streamer=streamer,
        closing=closing,
        device_nbytes=nbytes,
        loaded_nbytes=readers.nbytes_read,
        load_seconds=time.perf_counter() - began,
    )


def _join(
    checkpoint: Checkpoint, placement: Placement, config: EngineConfig, progress: Progress, stores: ExitStack
) -> tuple[WeightStreamer, Transformer, ReaderPool, int]:
    """Disk, host, device, matmul. What is opened on the way is closed by `stores`, last first."""
    spec, plan, layout, dtype = checkpoint.spec, placement.plan, placement.layout, placement.dtype
    on_cuda = placement.device.type == "cuda"

    readers = ReaderPool(checkpoint, plan.num_readers)
    stores.callback(readers.close)
    host = HostStore(plan.host_layers, spec, layout, dtype, pinned=on_cuda)
    stores.callback(host.close)
    staging = HostStore(range(NUM_STAGING) if on_cuda else (), spec, layout, dtype, pinned=on_cuda)
    stores.callback(staging.close)
    device = DeviceStore(plan, spec, layout, dtype, placement.device)

    progress.begin(f"loading {spec.name}", load_nbytes(checkpoint, plan))
    try:
        loader = Loader(checkpoint, readers, progress.advance)
        loader.load_device(device, staging.buffers)
        loader.load_host_layers(host, plan.host_layers)
        embedding = _embedding(placement, loader, readers, device)
    finally:
        progress.end()
    if not plan.disk_layers and plan.embedding_place != "disk":
        readers.close()  # nothing is read any more: give their buffers back
    else:
        readers.retune()

    streamer = WeightStreamer(
        residents=device.residents,
        streamed_layers=plan.streamed_layers,
        slots=device.slots,
        copier=_copier(checkpoint, placement, config, readers, host, staging),
        embedding=embedding,
        final_norm=device.final_norm,
        head=device.head,
    )
    stores.callback(streamer.close)
    cache = KVCache(spec, capacity=placement.context, dtype=dtype, device=placement.device)
    transformer = Transformer(spec, streamer, cache)
    return streamer, transformer, readers, device.nbytes + cache.nbytes + transformer.nbytes


def _embedding(placement: Placement, loader: Loader, readers: ReaderPool, device: DeviceStore) -> Embedding:
    where = placement.plan.embedding_place
    if where == "device":
        return TableEmbedding(device.head, placement.device)
    if where == "host":
        return TableEmbedding(loader.load_embedding(placement.dtype), placement.device)
    return DiskEmbedding(loader.info(None, "embedding"), readers, placement.dtype, placement.device)


def _copier(
    checkpoint: Checkpoint,
    placement: Placement,
    config: EngineConfig,
    readers: ReaderPool,
    host: HostStore,
    staging: HostStore,
) -> Copier | None:
    """The link: each layer by the copier of its tier, and no faster than --link-gbps where that is given."""
    plan = placement.plan
    if not plan.streamed_layers:
        return None
    from_host, from_disk = _tier_copiers(checkpoint, placement.device, readers, host, staging)
    tiers = dict.fromkeys(plan.host_layers, from_host) | dict.fromkeys(plan.disk_layers, from_disk)
    copier = TieredCopier(tiers)
    return copier if config.link_gbps is None else PacedCopier(copier, config.link_gbps * 1e9)


def _tier_copiers(
    checkpoint: Checkpoint, device: torch.device, readers: ReaderPool, host: HostStore, staging: HostStore
) -> tuple[Copier, Copier]:
    if device.type != "cuda":
        return HostCopier(host), DiskCopier(checkpoint, readers)
    from offload_sirius.weights.cuda import CudaCopier, StagedCopier

    uploads = CudaCopier(host, device)
    return uploads, StagedCopier(checkpoint, readers, uploads, staging.buffers)


def _on_disk(checkpoint: Checkpoint, progress: Progress) -> Checkpoint:
    """Synthetic weights that exceed memory are written once, as a real checkpoint, so that streaming them reads a real disk."""
    if checkpoint.path is not None:
        return checkpoint
    name = checkpoint.spec.name
    directory = cache_folder() / "synthetic" / "".join(each if each.isalnum() or each in ".-" else "_" for each in name)
    if not directory.exists():
        _make_folder(directory.parent)
        total = sum(info.nbytes for info in checkpoint.tensors.values())
        progress.begin(f"writing {name} to {directory}", total)
        try:
            write_checkpoint(checkpoint, directory, progress=progress.advance)
        finally:
            progress.end()
    return open_checkpoint(str(directory))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be made: {error.strerror}; set OFFLOAD_SIRIUS_CACHE to a folder that can be written to"
        ) from error
