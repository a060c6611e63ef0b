"""What goes where: pure arithmetic over a model's shape and two budgets. Knows no torch, reads no weight, allocates nothing.

The device holds what every step needs (head, final norm, KV cache, activations), then as many layers as fit, then a ring of
slots through which the others pass. Layers that do not fit are in host memory while that lasts, the rest stays on disk. Resident
layers stand evenly between streamed ones, and so do layers on disk between those in host memory: while one kind computes or
arrives quickly, the next slow one is already on its way.

Sparse steps want memory of their own. Coarse ones want the kept neurons of streamed layers gathered in host memory: first those
of layers on disk, of which a step otherwise reads everything, even if fewer layers are in host memory then. Fine ones want a
cache of neuron records on the device for each streamed layer, and get it before layers become resident, because the method asks
for it and what it is worth shall be seen. Residents would save more: a byte of a cache saves its share of hits in a draft step
and nothing in a correction, a resident one about 0.7 of itself in the one and all of itself in the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from offload_sirius.blocks import BlockFormat
from offload_sirius.errors import BudgetError
from offload_sirius.quantization import WeightFormat
from offload_sirius.units import format_size
from offload_sirius.weights.layout import LayerLayout
from offload_sirius_loaders.spec import ModelSpec

MIN_SLOTS = 2
"""One slot computes while the next one fills."""

MAX_SLOTS = 8

LINK_SHARE_OF_DEVICE_RATE = 0.25
"""A link is assumed to be no faster than this share of the rate at which the device reads its own memory. Slots must hold what
the link carries while the device computes the head, which no layer's computing overlaps."""

DISK_AHEAD_NBYTES = 256 << 20
"""A few times what a disk's readers have under way: slots that hold as much keep its queue full across the border of two
layers."""

MIN_READERS, MAX_READERS = 2, 32

CACHED_NEURON_NBYTES = 16
"""What a cache writes down of each neuron it has room for: which one it holds, and when that was needed last, as int64."""

LEAST_CACHED_SHARE = 0.25
"""Caches of fewer of the wanted neurons are not worth their bookkeeping."""

NUM_STAGING = 2
"""Host buffers of a layer's size through which a device with memory of its own is filled: one is read into, one uploaded."""

NUM_QUANTISING = 2
"""Host buffers of a matrix's size: one is read into while the other is quantised."""

ROWS_QUANTISING_NBYTES = 16 << 20
"""Host memory for rows of the head, or of layers of which there is a copy, and what they become: they are quantised some at a
time."""

CHUNK_NBYTES, NUM_CHUNKS = 8 << 20, 4
"""Pinned buffers through which host memory passes that could not be pinned."""

EmbeddingPlace = Literal["device", "host", "disk"]
"""device: the head's own matrix, where the two are tied. disk: rows are read as they are needed."""

HeadFormat = WeightFormat | BlockFormat | None
"""How the head is held; None: as plain numbers."""


@dataclass(frozen=True, kw_only=True)
class ReadingCost:
    """Host memory that reading from disk takes."""

    reader_nbytes: int
    """Of each reader: its buffer."""
    placer_nbytes: int
    """Of each of those who put in place what readers have read."""
    num_cores: int
    """There are as many of those as cores, and no more than readers."""

    def nbytes(self, num_readers: int) -> int:
        """What so many readers take, and those behind them."""
        return num_readers * self.reader_nbytes + min(num_readers, self.num_cores) * self.placer_nbytes

    def num_readers(self, room_nbytes: int) -> int:
        """As many readers as there is room for, from MIN_READERS to MAX_READERS."""
        fitting = (count for count in range(MIN_READERS, MAX_READERS + 1) if self.nbytes(count) <= room_nbytes)
        return max(fitting, default=MIN_READERS)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What the plan must make room for, computed by those who know."""

    kv_cache_nbytes: int
    position_tables_nbytes: int
    """Cosines and sines of all positions."""
    activation_nbytes: int
    reading: ReadingCost
    embedding_on_device: bool
    """The head is the embedding table, so that its rows can be taken from there."""
    staged: bool
    """The device has its own memory: what is read from disk passes through host buffers of a layer's size."""
    quantising_nbytes: int = 0
    """Host memory of the matrices that are read before they are quantised; 0 where none are."""
    rows_quantising_nbytes: int = 0
    """The same of rows that are quantised some at a time: of the head, or for a copy."""
    head_format: HeadFormat = None
    embedding_format: BlockFormat | None = None
    """The same of the embedding table."""
    num_shared_buffers: int | None = None
    """All streamed layers are in host memory and share that many buffers there: for timing shapes that exceed it."""
    sparsity_nbytes: int = 0
    """Device bytes that choosing neurons takes."""
    num_hot: int = 0
    """Neurons of each layer that are wanted on the device for good, where layers are to be partly resident."""
    draft_format: WeightFormat | None = None
    """Of a copy that these neurons are to be, with all attention blocks; None: they are the layers' own."""
    hot_layers_first: bool = False
    """Where not all of that fits: all of those neurons of some layers rather than fewer of every layer."""
    num_cached_neurons: int = 0
    """Neurons of each streamed layer whose up and down records are wanted on the device, beside its slots; 0 for none."""
    tables_in_codes: bool = False
    """On disk tables of down projections are in one with the codes: kept neurons do not spare reading those of a layer there."""


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes that may be used. On a machine without a GPU both are parts of the same memory."""

    device_nbytes: int
    host_nbytes: int


@dataclass(frozen=True, kw_only=True)
class HotPlan:
    """Layers are partly resident: attention block, and some neurons."""

    layers: tuple[int, ...]
    """Those layers: all, or as many as have room. Of the others nothing is resident."""
    num_hot: int
    """Neurons of each of them on the device, N; a draft step computes as many of the others."""
    num_cold_slots: int
    """Slots for the F - N others of a layer, in the memory of those for all of them."""
    cold_nbytes: int
    """Bytes of the others; where layers differ, the mean."""
    draft_format: WeightFormat | None = None
    """How a copy is held on which drafts compute, and which is what is on the device: then a correction brings all of a layer,
    and its slots are those of whole layers. None: hot neurons are the layer's own."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each layer lives and what that takes."""

    resident_layers: tuple[int, ...]
    host_layers: tuple[int, ...]
    disk_layers: tuple[int, ...]
    num_slots: int
    num_host_buffers: int
    """Layers' room in host memory: as many as host_layers, fewer where they share it."""
    kept_layers: tuple[int, ...]
    """Streamed layers whose kept neurons have room in host memory, gathered."""
    num_cached_neurons: int
    """Neurons of each streamed layer whose records have room on the device."""
    num_readers: int
    embedding_place: EmbeddingPlace
    layer_nbytes: int
    """A layer, or room for any where they differ."""
    pass_nbytes: int
    """Bytes that cross the link in one pass of the full model."""
    device_bill: Mapping[str, int]
    """Device bytes by purpose; they add up to device_nbytes."""
    host_bill: Mapping[str, int]
    """Host bytes by purpose; they add up to host_nbytes."""
    hot: HotPlan | None = None
    """None where layers are resident as a whole or not at all."""

    @property
    def device_nbytes(self) -> int:
        """Most device memory that will be used."""
        return sum(self.device_bill.values())

    @property
    def host_nbytes(self) -> int:
        """Most host memory that will be used for weights and for reading them."""
        return sum(self.host_bill.values())

    @property
    def streamed_layers(self) -> tuple[int, ...]:
        """Layers that cross the link in every pass, in order."""
        return tuple(sorted(self.host_layers + self.disk_layers))

    @property
    def sliceable_layers(self) -> tuple[int, ...]:
        """Streamed layers of which slices can cross the link alone."""
        return tuple(sorted({*self.host_layers, *self.kept_layers}))


def make_plan(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets) -> Plan:
    """Place the model's layers within the budgets. Raises BudgetError with the smallest budget that works."""
    plan = _make_plan(spec, layout, demand, budgets, demand.num_cached_neurons)
    # Of layers on disk no single records can be fetched, and a cache has nothing to save.
    return _make_plan(spec, layout, demand, budgets, 0) if plan.num_cached_neurons and plan.disk_layers else plan


def _make_plan(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets, max_cached_neurons: int) -> Plan:
    fixed = fixed_device_bill(spec, layout, demand)
    fixed_nbytes = sum(fixed.values())
    room = _layer_room(spec.num_layers, layout, fixed_nbytes, budgets.device_nbytes)
    left_nbytes = budgets.device_nbytes - fixed_nbytes
    head_ahead = int(fixed["head"] * LINK_SHARE_OF_DEVICE_RATE)
    device = _split_room(spec.num_layers, room, layout, left_nbytes, head_ahead, max_cached_neurons)
    host = place_on_host(spec, layout, demand, budgets, spec.num_layers - device.num_resident)
    if host.num_disk_layers:
        ahead_nbytes = max(head_ahead, DISK_AHEAD_NBYTES)
        device = _split_room(spec.num_layers, room, layout, left_nbytes, ahead_nbytes, max_cached_neurons)
        host = place_on_host(spec, layout, demand, budgets, spec.num_layers - device.num_resident)
    if host.num_disk_layers and demand.quantising_nbytes:
        needed = nbytes_for_all_on_host(spec, layout, demand, budgets, spec.num_layers - device.num_resident)
        raise BudgetError(
            f"host budget {format_size(budgets.host_nbytes)} is too small for --quantize, which needs all streamed layers in "
            f"host memory, as they are quantised while loading: {format_size(needed)}; give at least --host-memory "
            f"{as_flag(needed)}, more --device-memory, or as --model a copy that `offload-sirius pack --quantize` has made"
        )
    streamed = spread(spec.num_layers, spec.num_layers - device.num_resident)
    disk, on_host = split_streamed(streamed, host.num_disk_layers)
    resident = tuple(layer for layer in range(spec.num_layers) if layer not in set(streamed))
    return Plan(
        resident_layers=resident,
        host_layers=tuple(on_host),
        disk_layers=tuple(disk),
        num_slots=device.num_slots,
        num_host_buffers=host.num_buffers,
        kept_layers=kept_of(disk, on_host, host.num_kept),
        num_cached_neurons=device.num_cached_neurons,
        num_readers=host.num_readers,
        embedding_place=host.embedding_place,
        layer_nbytes=layout.nbytes,
        pass_nbytes=layout.total(whole_nbytes, streamed),
        device_bill=fixed
        | {
            "resident_layers": layout.total(whole_nbytes, resident),
            "slots": device.num_slots * layout.nbytes,
            "neuron_cache": layout.total(lambda each: neuron_cache_nbytes(each, device.num_cached_neurons), streamed),
        },
        host_bill=host.bill,
    )


def whole_nbytes(layout: LayerLayout) -> int:
    """Of a layer."""
    return layout.nbytes


def split_streamed(streamed: Sequence[int], num_disk: int) -> tuple[list[int], list[int]]:
    """Streamed layers on disk, evenly between those in host memory; and those."""
    disk = [streamed[index] for index in spread(len(streamed), num_disk)]
    return disk, [layer for layer in streamed if layer not in disk]


def kept_of(disk: Sequence[int], on_host: Sequence[int], num_kept: int) -> tuple[int, ...]:
    """Layers whose kept neurons have room in host memory: those on disk first."""
    return tuple(sorted([*disk, *on_host][:num_kept]))


def spread(num_all: int, num_chosen: int) -> tuple[int, ...]:
    """Choose num_chosen of range(num_all), evenly: index i where i * num_chosen / num_all passes a whole number."""
    return tuple(i for i in range(num_all) if (i + 1) * num_chosen // num_all > i * num_chosen // num_all)


def fixed_device_bill(spec: ModelSpec, layout: LayerLayout, demand: Demand) -> dict[str, int]:
    """Device bytes that every plan has.

    head       = V * D * element, or V rows that are quantised or blocks
    final_norm = D * element
    """
    return {
        "head": table_nbytes(spec, layout.element_nbytes, demand.head_format),
        "final_norm": spec.width * layout.element_nbytes,
        "kv_cache": demand.kv_cache_nbytes,
        "position_tables": demand.position_tables_nbytes,
        "activations": demand.activation_nbytes,
        "sparsity": demand.sparsity_nbytes,
    }


def table_nbytes(spec: ModelSpec, element_nbytes: int, form: HeadFormat) -> int:
    """Bytes of the head, or of the embedding table."""
    return spec.vocab_size * (spec.width * element_nbytes if form is None else form.row_nbytes(spec.width))


def least_device_nbytes(spec: ModelSpec, layout: LayerLayout, demand: Demand) -> int:
    """Device bytes that a plan takes at least."""
    layers_nbytes = min(layout.total(whole_nbytes, range(spec.num_layers)), MIN_SLOTS * layout.nbytes)
    return sum(fixed_device_bill(spec, layout, demand).values()) + layers_nbytes


def _layer_room(num_layers: int, layout: LayerLayout, fixed_nbytes: int, budget_nbytes: int) -> int:
    """Layers, resident ones and slots together, that the device has room for; num_layers at most.

    Where layers differ and do not all fit, each is counted as the largest.
    """
    layer_nbytes = layout.nbytes
    if fixed_nbytes + layout.total(whole_nbytes, range(num_layers)) <= budget_nbytes:
        return num_layers
    room = min((budget_nbytes - fixed_nbytes) // layer_nbytes, num_layers)
    needed = fixed_nbytes + min(MIN_SLOTS, num_layers) * layer_nbytes
    if budget_nbytes < needed:
        raise BudgetError(
            f"device budget {format_size(budget_nbytes)} is too small: head, KV cache, activations and {MIN_SLOTS} layer slots "
            f"need {format_size(needed)}; give at least --device-memory {as_flag(needed)}"
        )
    return room


def _num_slots(num_layers: int, room: int, layer_nbytes: int, ahead_nbytes: int) -> int:
    """Slots of the ring: none where everything is resident, else one to compute on and those that hold what is under way.

    Beyond four they take no more than half of the room, as each costs a resident layer.
    """
    if room >= num_layers:
        return 0
    wanted = 1 + -(-ahead_nbytes // layer_nbytes)
    return max(MIN_SLOTS, min(wanted, MAX_SLOTS, max(room // 2, min(room, 4))))


@dataclass(frozen=True, kw_only=True)
class _DeviceSplit:
    num_slots: int
    num_cached_neurons: int
    num_resident: int


def _split_room(
    num_layers: int, room: int, layout: LayerLayout, left_nbytes: int, ahead_nbytes: int, max_cached_neurons: int
) -> _DeviceSplit:
    """Slots first, then caches, then resident layers.

    left >= slots * layer + residents * layer + (layers - residents) * cache
    """
    num_slots = _num_slots(num_layers, room, layout.nbytes, ahead_nbytes)
    left_nbytes -= num_slots * layout.nbytes
    num_cached = min(max_cached_neurons, _num_cacheable(layout, left_nbytes // num_layers)) if num_slots else 0
    if num_cached < max_cached_neurons * LEAST_CACHED_SHARE:
        num_cached = 0
    cache_nbytes = neuron_cache_nbytes(layout, num_cached)
    num_resident = (left_nbytes - num_layers * cache_nbytes) // (layout.nbytes - cache_nbytes) if num_slots else num_layers
    return _DeviceSplit(
        num_slots=num_slots,
        num_cached_neurons=num_cached,
        # The ring is not to be longer than the streamed layers are many.
        num_resident=min(num_resident, num_layers - num_slots),
    )


def neuron_cache_nbytes(layout: LayerLayout, num_cached: int) -> int:
    """Device bytes of a layer's cache.

    cache = cached neurons * (record + what is written down of it) + a flag for each neuron of the layer
    """
    if num_cached == 0:
        return 0
    return num_cached * (layout.record_nbytes + CACHED_NEURON_NBYTES) + layout.num_neurons + 1


def _num_cacheable(layout: LayerLayout, room_nbytes: int) -> int:
    """Neurons of a layer for whose cache there is room."""
    return max(0, room_nbytes - layout.num_neurons - 1) // (layout.record_nbytes + CACHED_NEURON_NBYTES)


@dataclass(frozen=True, kw_only=True)
class HostPlacement:
    num_disk_layers: int
    num_buffers: int
    num_kept: int
    num_readers: int
    embedding_place: EmbeddingPlace
    bill: Mapping[str, int]


def place_on_host(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets, num_streamed: int) -> HostPlacement:
    """Readers first, as nothing loads without them (three quarters at most); then the embedding table; then layers.

    readers   = readers * one read buffer + cores * (room to turn a piece + one decoded piece)
    staging   = what `_staging_nbytes` says, on a device with its own memory
    quantising = matrices that are read before they are quantised, and rows of the head or for a copy
    embedding = V * D * element, or V rows of blocks, unless the device has it or its rows are read from disk
    layers    = layers in host memory * layer in whole pages
    kept      = layers whose kept neurons are gathered there * their bytes in whole pages
    """
    quantising_nbytes = demand.quantising_nbytes + demand.rows_quantising_nbytes
    most_staging_nbytes = quantising_nbytes + (_staging_nbytes(layout, 0) if demand.staged else 0)
    needed = demand.reading.nbytes(MIN_READERS) + most_staging_nbytes
    if budgets.host_nbytes < needed:
        raise BudgetError(
            f"host budget {format_size(budgets.host_nbytes)} is too small: reading weights takes {format_size(needed)}; "
            f"give at least --host-memory {as_flag(needed)}"
        )
    readers_room = min(budgets.host_nbytes * 3 // 4, budgets.host_nbytes - most_staging_nbytes)
    num_readers = demand.reading.num_readers(readers_room)
    reading_nbytes = demand.reading.nbytes(num_readers)
    room = budgets.host_nbytes - reading_nbytes
    embedding_nbytes = table_nbytes(spec, layout.element_nbytes, demand.embedding_format)
    fits = embedding_nbytes <= room - most_staging_nbytes
    place: EmbeddingPlace = "device" if demand.embedding_on_device else "host" if fits else "disk"
    embedding_nbytes = embedding_nbytes if place == "host" else 0
    streamed = spread(spec.num_layers, num_streamed)
    host = _host_layers(layout, demand, streamed, room - embedding_nbytes - quantising_nbytes)
    disk, on_host = split_streamed(streamed, num_streamed - host.num_layers)
    return HostPlacement(
        num_disk_layers=num_streamed - host.num_layers,
        num_buffers=host.num_buffers,
        num_kept=host.num_kept,
        num_readers=num_readers,
        embedding_place=place,
        bill={
            "readers": reading_nbytes,
            "staging": host.staging_nbytes,
            "quantising": quantising_nbytes,
            "embedding": embedding_nbytes,
            "layers": layout.total(lambda each: each.host_nbytes, on_host[: host.num_buffers]),
            "kept_neurons": layout.total(lambda each: each.kept_host_nbytes, kept_of(disk, on_host, host.num_kept)),
        },
    )


def nbytes_for_all_on_host(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets, num_streamed: int) -> int:
    """A host budget in which none of so many layers stays on disk."""
    # With more memory there are also more readers, and the embedding: no less than all of them is sure to do.
    unlimited = replace(budgets, host_nbytes=1 << 62)
    return sum(place_on_host(spec, layout, demand, unlimited, num_streamed).bill.values())


@dataclass(frozen=True, kw_only=True)
class _HostLayers:
    num_layers: int
    num_buffers: int
    """As many, unless they share."""
    num_kept: int
    """Streamed layers whose kept neurons have room, those on disk first."""
    staging_nbytes: int
    """What filling a device with its own memory takes beside them."""


def _host_layers(layout: LayerLayout, demand: Demand, streamed: Sequence[int], room_nbytes: int) -> _HostLayers:
    """Layers that host memory holds. Where they differ and do not all fit, each is counted as the largest."""
    num_streamed = len(streamed)
    wanted = num_streamed if demand.num_shared_buffers is None else min(num_streamed, demand.num_shared_buffers)
    all_nbytes = layout.total(lambda each: each.host_nbytes, streamed)
    for num_all_on_host in (wanted, 0):  # where some are left on disk, staging takes more
        staging_nbytes = _staging_nbytes(layout, num_all_on_host) if demand.staged else 0
        num_buffers = max(0, min(wanted, (room_nbytes - staging_nbytes) // layout.host_nbytes))
        if demand.num_shared_buffers is None and all_nbytes <= room_nbytes - staging_nbytes:
            num_buffers = wanted
        if num_buffers == wanted:
            break
    if demand.num_shared_buffers is None:
        return _beside_kept(layout, demand, num_streamed, num_buffers, staging_nbytes, room_nbytes - staging_nbytes, all_nbytes)
    if num_buffers < wanted:
        raise BudgetError(
            f"host memory has room for {num_buffers} shared buffers of {format_size(layout.host_nbytes)}, {wanted} are asked "
            "for; give a larger --host-memory or fewer --shared-host-buffers"
        )
    return _HostLayers(num_layers=num_streamed, num_buffers=wanted, num_kept=0, staging_nbytes=staging_nbytes)


def _beside_kept(
    layout: LayerLayout,
    demand: Demand,
    num_streamed: int,
    num_fitting: int,
    staging_nbytes: int,
    room_nbytes: int,
    all_nbytes: int,
) -> _HostLayers:
    """Layers in host memory and kept neurons beside each other. num_fitting: layers that fit where nothing else is there.

    all_nbytes: of all that are streamed.

    Where all layers fit, their kept neurons take what is left. Where some stay on disk, the kept neurons of those come first,
    if they spare reading anything; else there are none:

    room >= host layers * layer + (streamed layers - host layers) * kept
    """
    kept_nbytes, num_layers = layout.kept_host_nbytes, num_fitting
    if kept_nbytes == 0 or (num_layers < num_streamed and demand.tables_in_codes):
        return _HostLayers(num_layers=num_layers, num_buffers=num_layers, num_kept=0, staging_nbytes=staging_nbytes)
    if num_layers < num_streamed:
        num_layers = max(0, (room_nbytes - num_streamed * kept_nbytes) // (layout.host_nbytes - kept_nbytes))
    layers_nbytes = all_nbytes if num_layers == num_streamed else num_layers * layout.host_nbytes
    num_kept = min(num_streamed, max(0, room_nbytes - layers_nbytes) // kept_nbytes)
    return _HostLayers(num_layers=num_layers, num_buffers=num_layers, num_kept=num_kept, staging_nbytes=staging_nbytes)


def _staging_nbytes(layout: LayerLayout, num_host: int) -> int:
    """Host bytes through which a device with its own memory is filled, where that many layers and no others are streamed.

    chunks = for layers that the driver refuses to pin
    layers = for what is read from disk; two of the arena serve while it is being filled, where it has as many and they are alike
    """
    has_own = num_host < NUM_STAGING or layout.by_layer
    return NUM_CHUNKS * CHUNK_NBYTES + (NUM_STAGING * layout.staging.host_nbytes if has_own else 0)


def as_flag(nbytes: int) -> str:
    """A size as it can be typed after a flag, `1.25GiB`, never less than nbytes."""
    return format_size(nbytes).replace(" ", "")
