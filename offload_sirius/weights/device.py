"""What lives on the device: slots of the ring, resident layers, caches of neurons, head and final norm. Allocated once, by plan.

Knows neither where bytes come from nor which layer is in which slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from offload_sirius.kernels.blocks import BlockRows
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import WeightFormat
from offload_sirius.weights.buffers import LayerBuffer, kept_neurons
from offload_sirius.weights.copy_plan import copy_layout
from offload_sirius.weights.host import allocate_bytes
from offload_sirius.weights.hot_plan import hot_layouts
from offload_sirius.weights.hotset import HotSlot, whole_slot
from offload_sirius.weights.layout import Cargo, LayerLayout, distinct
from offload_sirius.weights.neuron_cache import NeuronCache
from offload_sirius.weights.plan import HeadFormat, Plan
from offload_sirius_loaders.spec import ModelSpec

Head = Tensor | QuantizedRows | BlockRows
"""[V, D]"""


class DeviceStore:
    """Fixed buffers on the device. `nbytes` is what they take."""

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        layout: LayerLayout,
        dtype: torch.dtype,
        device: torch.device,
        head_format: HeadFormat = None,
    ) -> None:
        """head_format: None for a head of plain numbers. Raises BudgetError when the device's memory runs out."""
        self.device = device
        self.head = _head(spec, head_format, dtype=dtype, device=device)
        self.final_norm = _matrix(spec.width, dtype=dtype, device=device)

        def layer_buffer(own: LayerLayout) -> LayerBuffer:
            return LayerBuffer(allocate_bytes(own.nbytes, device, "device"), spec, own, dtype)

        def cached_records(layer: int) -> Tensor:
            field = layout.layer(layer).fields["up_down"]
            held_as = torch.uint8 if field.is_bytes else dtype
            return _matrix(plan.num_cached_neurons, *field.shape[1:], dtype=held_as, device=device)

        self.residents = {layer: layer_buffer(layout.layer(layer)) for layer in plan.resident_layers}
        self.slots = [layer_buffer(layout) for _ in range(plan.num_slots)]
        self.caches = {
            layer: NeuronCache(cached_records(layer), spec.ffn_width) for layer in plan.streamed_layers if plan.num_cached_neurons
        }
        """Streamed layer -> records of neurons that its last tokens needed."""

    @property
    def nbytes(self) -> int:
        """Bytes of everything allocated here."""
        layers = [*self.residents.values(), *self.slots]
        caches = sum(cache.nbytes for cache in self.caches.values())
        return self.head.nbytes + self.final_norm.nbytes + sum(layer.storage.nbytes for layer in layers) + caches


class HotDeviceStore:
    """Fixed buffers on a device that holds layers in part."""

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        layout: LayerLayout,
        dtype: torch.dtype,
        device: torch.device,
        head_format: HeadFormat = None,
    ) -> None:
        """See DeviceStore."""
        assert plan.hot is not None
        self.device = device
        self.head = _head(spec, head_format, dtype=dtype, device=device)
        self.final_norm = _matrix(spec.width, dtype=dtype, device=device)
        hot = plan.hot
        layouts, hot_spec = hot_layouts(spec, layout, hot.num_hot), replace(spec, ffn_width=hot.num_hot)
        self.residents: dict[int, LayerBuffer] = {}
        """Layers that are resident as a whole: none."""
        self.layers = {
            layer: LayerBuffer(allocate_bytes(own.nbytes, device, "device"), hot_spec, own, dtype)
            for layer, own in ((layer, layouts.resident.layer(layer)) for layer in hot.layers)
        }
        """Attention block and hot neurons of every hot layer."""
        self._slot_memory = allocate_bytes(plan.device_bill["slots"], device, "device")

        def places(count: int, nbytes: int) -> list[Tensor]:
            return [self._slot_memory[index * nbytes : (index + 1) * nbytes] for index in range(count)]

        def neuron_slots(cargo: Cargo, count: int, slot_layout: LayerLayout) -> list[HotSlot]:
            all_places = places(count, slot_layout.kept_nbytes)

            def slot(place: Tensor, own: LayerLayout) -> HotSlot:
                return HotSlot({cargo: kept_neurons(place[: own.kept_nbytes], own, dtype)})

            return [_of_layers(slot_layout, partial(slot, place)) for place in all_places]

        self.slots: dict[Cargo, Sequence[HotSlot]]
        """Cargo of a pass -> slots for it, in the same memory."""
        if len(hot.layers) == spec.num_layers:
            self.slots = {
                "records": neuron_slots("records", plan.num_slots, layouts.whole),
                "cold": neuron_slots("cold", hot.num_cold_slots, layouts.cold),
            }
        else:
            buffers = [LayerBuffer(place, spec, layout, dtype) for place in places(plan.num_slots, layout.nbytes)]

            def whole_slot_of(buffer: LayerBuffer, own: LayerLayout) -> HotSlot:
                return whole_slot(buffer.of_layout(own), hot.num_hot)

            whole = [_of_layers(layout, partial(whole_slot_of, buffer)) for buffer in buffers]
            self.slots = {"records": whole, "hot": whole, "cold": whole}

    @property
    def nbytes(self) -> int:
        """Bytes of everything allocated here."""
        layers = sum(layer.storage.nbytes for layer in self.layers.values())
        return self.head.nbytes + self.final_norm.nbytes + layers + self._slot_memory.nbytes


class CopyDeviceStore:
    """Fixed buffers on a device that holds a quantised copy of every layer for drafts."""

    def __init__(
        self,
        plan: Plan,
        spec: ModelSpec,
        layout: LayerLayout,
        dtype: torch.dtype,
        device: torch.device,
        head_format: HeadFormat = None,
    ) -> None:
        """See DeviceStore."""
        assert plan.hot is not None
        assert plan.hot.draft_format is not None
        self.device = device
        self.head = _head(spec, head_format, dtype=dtype, device=device)
        self.final_norm = _matrix(spec.width, dtype=dtype, device=device)
        copied_spec = replace(spec, ffn_width=plan.hot.num_hot)
        copied = copy_layout(spec, layout, plan.hot.draft_format, plan.hot.num_hot)
        self.residents: dict[int, LayerBuffer] = {}
        """Layers that are resident as they are: none."""
        self.layers = {
            layer: LayerBuffer(allocate_bytes(copied.nbytes, device, "device"), copied_spec, copied, dtype)
            for layer in plan.hot.layers
        }
        """The copy of every layer."""
        self.slots = [
            LayerBuffer(allocate_bytes(layout.nbytes, device, "device"), spec, layout, dtype) for _ in range(plan.num_slots)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of everything allocated here."""
        layers = [*self.layers.values(), *self.slots]
        return self.head.nbytes + self.final_norm.nbytes + sum(layer.storage.nbytes for layer in layers)


AnyDeviceStore = DeviceStore | HotDeviceStore | CopyDeviceStore


def _of_layers(layout: LayerLayout, slot: Callable[[LayerLayout], HotSlot]) -> HotSlot:
    """A slot as it is cut by a layout, and, where layers differ, by that of each layer."""
    others = {id(each): slot(each) for each in distinct(layout.by_layer)}
    return replace(slot(layout), by_layer=tuple(others[id(each)] for each in layout.by_layer))


def _head(spec: ModelSpec, head_format: HeadFormat, *, dtype: torch.dtype, device: torch.device) -> Head:
    """Room for the head, [V, D]."""
    if head_format is None:
        return _matrix(spec.vocab_size, spec.width, dtype=dtype, device=device)
    rows = _matrix(spec.vocab_size, head_format.row_nbytes(spec.width), dtype=torch.uint8, device=device)
    if isinstance(head_format, WeightFormat):
        return QuantizedRows(rows, spec.width, head_format)
    return BlockRows(rows, spec.width, head_format)


def _matrix(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return allocate_bytes(prod(shape) * dtype.itemsize, device, "device").view(dtype).view(shape)
