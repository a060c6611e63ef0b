"""What lives on the device: slots of the ring, resident layers, caches of neurons, head and final norm. Allocated once, by plan.

Knows neither where bytes come from nor which layer is in which slot.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer, kept_neurons
from offload_sirius.weights.host import allocate_bytes
from offload_sirius.weights.hot_plan import hot_layouts
from offload_sirius.weights.hotset import HotSlots
from offload_sirius.weights.layout import LayerLayout
from offload_sirius.weights.neuron_cache import NeuronCache
from offload_sirius.weights.plan import Plan
from offload_sirius_loaders.spec import ModelSpec


class DeviceStore:
    """Fixed buffers on the device. `nbytes` is what they take."""

    def __init__(self, plan: Plan, spec: ModelSpec, layout: LayerLayout, dtype: torch.dtype, device: torch.device) -> None:
        """Raises BudgetError when the device's memory runs out."""
        self.device = device
        self.head = _matrix(spec.vocab_size, spec.width, dtype=dtype, device=device)
        self.final_norm = _matrix(spec.width, dtype=dtype, device=device)

        def layer_buffer() -> LayerBuffer:
            return LayerBuffer(allocate_bytes(layout.nbytes, device, "device"), spec, layout, dtype)

        def cached_records() -> Tensor:
            field = layout.fields["up_down"]
            held_as = dtype if field.num_columns is None else torch.uint8
            return _matrix(plan.num_cached_neurons, *field.shape[1:], dtype=held_as, device=device)

        self.residents = {layer: layer_buffer() for layer in plan.resident_layers}
        self.slots = [layer_buffer() for _ in range(plan.num_slots)]
        self.caches = {
            layer: NeuronCache(cached_records(), spec.ffn_width)
            for layer in plan.streamed_layers
            if plan.num_cached_neurons
        }
        """Streamed layer -> records of neurons that its last tokens needed."""

    @property
    def nbytes(self) -> int:
        """Bytes of everything allocated here."""
        layers = [*self.residents.values(), *self.slots]
        caches = sum(cache.nbytes for cache in self.caches.values())
        return self.head.nbytes + self.final_norm.nbytes + sum(layer.storage.nbytes for layer in layers) + caches


class HotDeviceStore:
    """Fixed buffers on a device that holds every layer in part."""

    def __init__(self, plan: Plan, spec: ModelSpec, layout: LayerLayout, dtype: torch.dtype, device: torch.device) -> None:
        """Raises BudgetError when the device's memory runs out."""
        assert plan.hot is not None
        self.device = device
        self.head = _matrix(spec.vocab_size, spec.width, dtype=dtype, device=device)
        self.final_norm = _matrix(spec.width, dtype=dtype, device=device)
        layouts, hot_spec = hot_layouts(spec, layout.element_nbytes, plan.hot.num_hot), replace(spec, ffn_width=plan.hot.num_hot)
        self.residents: dict[int, LayerBuffer] = {}
        """Layers that are resident as a whole: none."""
        self.layers = {
            layer: LayerBuffer(allocate_bytes(layouts.resident.nbytes, device, "device"), hot_spec, layouts.resident, dtype)
            for layer in range(spec.num_layers)
        }
        """Attention block and hot neurons of every layer."""
        self._slot_memory = allocate_bytes(plan.device_bill["slots"], device, "device")

        def slots(count: int, slot_layout: LayerLayout) -> list[KeptNeurons]:
            nbytes = slot_layout.kept_nbytes
            return [
                kept_neurons(self._slot_memory[index * nbytes : (index + 1) * nbytes], slot_layout, dtype)
                for index in range(count)
            ]

        self.slots = HotSlots(whole=slots(plan.num_slots, layouts.whole), cold=slots(plan.hot.num_cold_slots, layouts.cold))

    @property
    def nbytes(self) -> int:
        """Bytes of everything allocated here."""
        layers = sum(layer.storage.nbytes for layer in self.layers.values())
        return self.head.nbytes + self.final_norm.nbytes + layers + self._slot_memory.nbytes


def _matrix(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return allocate_bytes(prod(shape) * dtype.itemsize, device, "device").view(dtype).view(shape)
