"""Where the rooms are joined. `build` reads as the way of a weight: disk -> host -> device -> matmul."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from offload_sirius.cache import cache_folder, safe_name
from offload_sirius.config import EngineConfig
from offload_sirius.engine.captured import CapturedStep, ResidentLayers, recorder_on
from offload_sirius.engine.engine import Engine
from offload_sirius.engine.link import Arenas, Origins, make_arenas, make_link, sender_to, uplink_to
from offload_sirius.engine.opened import Model
from offload_sirius.engine.placement import Placement, is_of_device_memory, memory_errors, place, release_device_memory
from offload_sirius.engine.planning import as_packed
from offload_sirius.engine.progress import Progress
from offload_sirius.engine.streamed import StreamedModel, copied_model, hot_model, streamed_model
from offload_sirius.errors import BudgetError, ConfigError
from offload_sirius.kernels.blocks import BlockRows
from offload_sirius.kernels.native import native
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.kv_int8 import QuantizedKVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius.sparsity.prior import NeuronPrior, PriorFile, prior_path
from offload_sirius.trace import Tracer
from offload_sirius.units import format_size
from offload_sirius.weights.copiers import Copier
from offload_sirius.weights.device import AnyDeviceStore, CopyDeviceStore, DeviceStore, HotDeviceStore
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.draft_copy import CopyStreamer, copy_layer, num_weights
from offload_sirius.weights.embedding import DiskEmbedding, Embedding, TableEmbedding
from offload_sirius.weights.hotset import HotStreamer
from offload_sirius.weights.load import Loader
from offload_sirius.weights.pieces import load_nbytes
from offload_sirius.weights.pinning import PinReport
from offload_sirius.weights.plan import Plan
from offload_sirius.weights.streamer import WeightStreamer
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.writer import write_checkpoint

AnyStreamer = WeightStreamer | HotStreamer | CopyStreamer
RETRY_SHARE = 0.85
"""Of the device memory that was planned, what a second try takes."""


def build(model: Model, config: EngineConfig, progress: Progress, tracer: Tracer | None = None) -> Engine:
    """Plan where the weights go, bring them there, and join everything that a pass needs.

    Where the device's memory runs out in spite of the plan, as others have taken of it, it is tried once more with less.
    """
    began = time.perf_counter()
    config = as_packed(config, model.checkpoint)
    placement = place(model.checkpoint, config)
    try:
        return _built(model, config, placement, progress, tracer, began)
    except BudgetError as error:
        if not is_of_device_memory(error):
            raise
        problem = str(error)
    # Not in the handler: the error holds on to what was allocated, which would be missing from what is free.
    release_device_memory(placement.device)
    config, placement = _smaller(model.checkpoint, config, placement, problem)
    progress.warn(
        f"the device's memory ran out while the model was loaded; once more with {format_size(placement.plan.device_nbytes)}"
    )
    return _built(model, config, placement, progress, tracer, began)


def _built(
    model: Model, config: EngineConfig, placement: Placement, progress: Progress, tracer: Tracer | None, began: float
) -> Engine:
    # Before the threads that put pieces in place ask for one each, which torch takes for what the next thread wants.
    torch.set_num_threads(config.threads or placement.planned.hardware.num_cores)
    checkpoint = placement.planned.checkpoint
    if placement.plan.disk_layers:
        checkpoint = _on_disk(checkpoint, progress)
    with memory_errors(placement.plan), ExitStack() as stores:
        joined = _join(checkpoint, placement, config, progress, tracer, stores)
        stores.callback(checkpoint.close)
        closing = stores.pop_all()
    streamer, transformer, streamed, readers, nbytes, pinned = joined
    return Engine(
        model=model,
        checkpoint=checkpoint,
        config=config,
        placement=placement,
        transformer=transformer,
        streamed=streamed,
        streamer=streamer,
        closing=closing,
        device_nbytes=nbytes,
        pinned=pinned,
        loaded_nbytes=readers.nbytes_read,
        load_seconds=time.perf_counter() - began,
        tracer=tracer,
    )


def _smaller(checkpoint: Checkpoint, config: EngineConfig, placement: Placement, problem: str) -> tuple[EngineConfig, Placement]:
    """The next plan to try. Raises BudgetError with the first one's problem where there is none."""
    less = replace(config, device_memory=str(int(placement.plan.device_nbytes * RETRY_SHARE)))
    try:
        return less, place(checkpoint, less)
    except BudgetError:
        raise BudgetError(problem) from None


def _join(
    checkpoint: Checkpoint,
    placement: Placement,
    config: EngineConfig,
    progress: Progress,
    tracer: Tracer | None,
    stores: ExitStack,
) -> tuple[AnyStreamer, Transformer, StreamedModel, ReaderPool, int, PinReport]:
    """Disk, host, device, matmul. What is opened on the way is closed by `stores`, last first."""
    spec, plan, layout, dtype = checkpoint.spec, placement.plan, placement.layout, placement.dtype
    uplink = uplink_to(placement.device)
    if uplink is not None and tracer is not None:
        tracer.clock = uplink.clock()

    readers = ReaderPool(checkpoint, plan.num_readers)
    stores.callback(readers.close)
    arenas = make_arenas(placement, spec, uplink)
    stores.callback(arenas.close)
    device = _store_for(plan)(plan, spec, layout, dtype, placement.device, placement.head_format)
    if placement.device.type == "cpu":
        for library in placement.planned.libraries:
            if problem := native(library).problem:
                progress.warn(problem)

    progress.begin(f"loading {spec.name}", load_nbytes(checkpoint, plan))
    try:
        is_quantised_now = layout.format is not None and checkpoint.packed is None
        loader = Loader(checkpoint, readers, progress.advance, quantise_from=dtype if is_quantised_now else None)
        loader.load_device(device, arenas.on_the_way)
        loader.load_host_layers(arenas.layers, plan.host_layers[: plan.num_host_buffers])
        embedding = _embedding(placement, loader, readers, device)
    finally:
        progress.end()
    if isinstance(device, CopyDeviceStore):
        _fill_copy(device, arenas, progress)
    if plan.disk_layers or plan.embedding_place == "disk":
        readers.retune()
    else:
        readers.close()  # nothing is read any more: give their buffers back
    arenas.give_back_unused(plan)

    copier = make_link(Origins(checkpoint, readers, arenas), plan, uplink, config.link_gbps, progress, tracer)
    streamer = _streamer(device, placement, arenas, copier, embedding, tracer)
    stores.callback(streamer.close)
    kind = QuantizedKVCache if config.kv_dtype == "int8" else KVCache
    caches = [kind(spec, capacity=placement.context, dtype=dtype, device=placement.device) for _ in range(config.parallel)]
    transformer = Transformer(spec, streamer, caches[0], tracer=tracer, more_caches=caches[1:])
    captured = _captured(device, placement, transformer, streamer, progress, tracer)
    prior = _prior(checkpoint, placement, progress)
    streamed = _decoded(device, placement, transformer, streamer, captured, prior, caches[1:])
    nbytes = device.nbytes + sum(cache.nbytes for cache in caches) + transformer.nbytes + plan.device_bill["sparsity"]
    return streamer, transformer, streamed, readers, nbytes, arenas.report()


def _store_for(plan: Plan) -> type[DeviceStore] | type[HotDeviceStore] | type[CopyDeviceStore]:
    """The kind of store that the plan describes."""
    if plan.hot is None:
        return DeviceStore
    return HotDeviceStore if plan.hot.draft_format is None else CopyDeviceStore


def _fill_copy(device: CopyDeviceStore, arenas: Arenas, progress: Progress) -> None:
    """Quantise the copy for drafts out of the layers in host memory."""
    progress.begin("quantising a copy for drafts", sum(num_weights(copy) for copy in device.layers.values()))
    try:
        for layer, copy in device.layers.items():
            copy_layer(arenas.layers.layer(layer), copy, progress.advance)
    finally:
        progress.end()


def _streamer(
    device: AnyDeviceStore,
    placement: Placement,
    arenas: Arenas,
    copier: Copier | None,
    embedding: Embedding,
    tracer: Tracer | None,
) -> AnyStreamer:
    """The source of weights that fits the plan. Attention blocks that are resident beside some neurons come from the arena."""
    plan, final_norm, head = placement.plan, device.final_norm, device.head
    if isinstance(device, HotDeviceStore):
        assert copier is not None
        for layer, buffer in device.layers.items():
            buffer.parts["attention"].copy_(arenas.layers.layer(layer).parts["attention"])
        return HotStreamer(
            layers=device.layers,
            streamed_layers=[layer for layer in plan.streamed_layers if layer not in device.layers],
            slots=device.slots,
            copier=copier,
            embedding=embedding,
            final_norm=final_norm,
            head=head,
            overlap=placement.planned.config.decoding.overlap,
            tracer=tracer,
        )
    if isinstance(device, CopyDeviceStore):
        assert copier is not None
        return CopyStreamer(
            copies=device.layers,
            slots=device.slots,
            copier=copier,
            embedding=embedding,
            final_norm=final_norm,
            head=head,
            overlap=placement.planned.config.decoding.overlap,
            tracer=tracer,
        )
    return WeightStreamer(
        residents=device.residents,
        streamed_layers=plan.streamed_layers,
        slots=device.slots,
        sliceable=plan.sliceable_layers,
        kept=arenas.kept,
        # Where the device is the host, a slot is as near as the arena, and all layers pass through one.
        arena={} if arenas.chunks is None else {layer: arenas.layers.layer(layer) for layer in plan.host_layers},
        copier=copier,
        embedding=embedding,
        final_norm=final_norm,
        head=head,
        tracer=tracer,
    )


def _captured(
    device: AnyDeviceStore,
    placement: Placement,
    transformer: Transformer,
    streamer: AnyStreamer,
    progress: Progress,
    tracer: Tracer | None,
) -> CapturedStep | None:
    """The draft step that the device records; None where it differs from step to step, or the device records none."""
    recorder = recorder_on(placement.device) if placement.planned.records_drafts else None
    if recorder is None:
        return None
    assert isinstance(device, HotDeviceStore | CopyDeviceStore)
    assert placement.plan.hot is not None
    num_drafted = placement.planned.config.decoding.num_drafted(transformer.spec.ffn_width, placement.plan.hot.num_hot)
    step = transformer.fixed_step(ResidentLayers(device.layers, streamer, num_drafted))
    return CapturedStep(step, num_drafted, recorder, progress.warn, tracer)


def _prior(checkpoint: Checkpoint, placement: Placement, progress: Progress) -> NeuronPrior | None:
    """What earlier runs say about the neurons, where somebody wants to know."""
    config = placement.planned.config
    if placement.plan.hot is None or not config.decoding.with_prior or config.shared_host_buffers is not None:
        return None  # layers that share buffers say what other layers' weights would
    file = PriorFile(prior_path(cache_folder(), checkpoint), progress.warn)
    return NeuronPrior(file, checkpoint.spec, device=placement.device)


def _decoded(
    device: AnyDeviceStore,
    placement: Placement,
    transformer: Transformer,
    streamer: AnyStreamer,
    captured: CapturedStep | None,
    prior: NeuronPrior | None,
    more_caches: Sequence[KVCache],
) -> StreamedModel:
    """The model as decoding sees it."""
    decoding = placement.planned.config.decoding
    if isinstance(streamer, HotStreamer):
        assert placement.plan.hot is not None
        return hot_model(transformer, streamer, placement.plan.hot.num_hot, decoding, captured, prior, more_caches)
    if isinstance(streamer, CopyStreamer):
        assert placement.plan.hot is not None
        return copied_model(transformer, streamer, placement.plan.hot.num_hot, decoding, captured, prior, more_caches)
    assert isinstance(device, DeviceStore)
    return streamed_model(transformer, streamer, device.caches, decoding, more_caches)


def _embedding(placement: Placement, loader: Loader, readers: ReaderPool, device: AnyDeviceStore) -> Embedding:
    where = placement.plan.embedding_place
    form, send = placement.planned.demand.embedding_format, sender_to(placement.device)
    if where == "device":
        assert isinstance(device.head, torch.Tensor | BlockRows)
        return TableEmbedding(device.head, placement.dtype, send)
    if where == "host":
        return TableEmbedding(loader.load_embedding(placement.dtype, form), placement.dtype, send)
    return DiskEmbedding(loader.info(None, "embedding"), readers, placement.dtype, send, form)


def _on_disk(checkpoint: Checkpoint, progress: Progress) -> Checkpoint:
    """Synthetic weights that exceed memory are written once, as a real checkpoint, so that streaming them reads a real disk."""
    if checkpoint.path is not None:
        return checkpoint
    name = checkpoint.spec.name
    directory = cache_folder() / "synthetic" / safe_name(name)
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
