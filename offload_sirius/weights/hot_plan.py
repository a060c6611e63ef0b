"""What goes where when every layer is partly resident: pure arithmetic, as plan.py. Knows no torch.

The device holds head, final norm, KV cache and activations, then all attention blocks, then as many hot neurons of each layer, an
equal number of all, as are asked for or fit. What is left beyond two slots of a whole layer's neurons goes to slots, too: they
hold what the link brings while a draft computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload_sirius.errors import BudgetError
from offload_sirius.units import format_size
from offload_sirius.weights.layout import LayerLayout, layer_layout
from offload_sirius.weights.plan import MIN_SLOTS, Budgets, Demand, HotPlan, Plan, as_flag, fixed_device_bill, place_on_host
from offload_sirius_loaders.spec import ModelSpec

LEAST_HOT_SHARE = 1 / 16
"""Fewer of the layer's neurons make no draft that is worth its time."""


@dataclass(frozen=True, kw_only=True)
class HotLayouts:
    """How the parts of a model lie whose layers each have that many hot neurons."""

    resident: LayerLayout
    """Attention block and hot neurons: a layer of N neurons."""
    whole: LayerLayout
    """All neurons, `kept` in the terms of a layout."""
    cold: LayerLayout
    """Those that are not hot, likewise."""


def hot_layouts(spec: ModelSpec, element_nbytes: int, num_hot: int) -> HotLayouts:
    """Lay out residents and slots."""
    return HotLayouts(
        resident=layer_layout(replace(spec, ffn_width=num_hot), element_nbytes),
        whole=layer_layout(spec, element_nbytes, spec.ffn_width),
        cold=layer_layout(spec, element_nbytes, spec.ffn_width - num_hot),
    )


def make_hot_plan(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets) -> Plan:
    """Place the model within the budgets. demand.num_hot: hot neurons of each layer that are asked for, below F.

    Raises BudgetError with the smallest budget that works.
    """
    fixed = fixed_device_bill(spec, layout, demand)
    left_nbytes = budgets.device_nbytes - sum(fixed.values())
    num_hot = _num_hot(spec, layout.element_nbytes, demand.num_hot, left_nbytes)
    if num_hot == 0:
        needed = sum(fixed.values()) + _least_nbytes(spec, layout.element_nbytes, _least_hot(spec, demand.num_hot))
        raise BudgetError(
            f"device budget {format_size(budgets.device_nbytes)} is too small for --draft resident: head, KV cache, activations, "
            f"all attention blocks, some neurons of every layer and {MIN_SLOTS} slots need {format_size(needed)}; give at least "
            f"--device-memory {as_flag(needed)}, or --draft streamed"
        )
    layouts = hot_layouts(spec, layout.element_nbytes, num_hot)
    residents_nbytes = spec.num_layers * layouts.resident.nbytes
    most_nbytes = max(MIN_SLOTS * layouts.whole.kept_nbytes, spec.num_layers * layouts.cold.kept_nbytes)
    slots_nbytes = min(left_nbytes - residents_nbytes, most_nbytes)
    host = place_on_host(spec, layout, demand, budgets, spec.num_layers)
    if host.num_disk_layers:
        # With more memory there are also more readers, and the embedding: no less than all of them is sure to do.
        unlimited = replace(budgets, host_nbytes=1 << 62)
        needed = sum(place_on_host(spec, layout, demand, unlimited, spec.num_layers).bill.values())
        raise BudgetError(
            f"host budget {format_size(budgets.host_nbytes)} is too small for --draft resident, which needs all layers in host "
            f"memory: {format_size(needed)}; give at least --host-memory {as_flag(needed)}, or --draft streamed"
        )
    return Plan(
        resident_layers=(),
        host_layers=tuple(range(spec.num_layers)),
        disk_layers=(),
        num_slots=slots_nbytes // layouts.whole.kept_nbytes,
        num_host_buffers=host.num_buffers,
        kept_layers=(),
        num_cached_neurons=0,
        num_readers=host.num_readers,
        embedding_place=host.embedding_place,
        layer_nbytes=layout.nbytes,
        hot=HotPlan(
            num_hot=num_hot,
            num_cold_slots=min(slots_nbytes // layouts.cold.kept_nbytes, spec.num_layers),
            cold_nbytes=layouts.cold.kept_nbytes,
        ),
        device_bill=fixed
        | {
            "resident_layers": 0,
            "attention": spec.num_layers * layouts.resident.attention_nbytes,
            "hot_neurons": spec.num_layers * layouts.resident.records_nbytes,
            "slots": slots_nbytes,
        },
        host_bill=host.bill,
    )


def _num_hot(spec: ModelSpec, element_nbytes: int, most: int, left_nbytes: int) -> int:
    """Hot neurons of each layer for which there is room; 0 where there is too little for any.

    left >= layers * (attention block + hot neurons) + slots * all neurons of a layer
    """
    record_nbytes = 3 * spec.width * element_nbytes
    room = left_nbytes - _least_nbytes(spec, element_nbytes, 0)
    num_hot = min(most, max(0, room) // (spec.num_layers * record_nbytes))
    while num_hot and _least_nbytes(spec, element_nbytes, num_hot) > left_nbytes:  # alignment
        num_hot -= 1
    return num_hot if num_hot >= _least_hot(spec, most) else 0


def _least_hot(spec: ModelSpec, most: int) -> int:
    """The fewest hot neurons of a layer that make a draft."""
    return min(most, max(1, int(spec.ffn_width * LEAST_HOT_SHARE)))


def _least_nbytes(spec: ModelSpec, element_nbytes: int, num_hot: int) -> int:
    """Device bytes of layers with that many hot neurons, and of the fewest slots."""
    whole = layer_layout(spec, element_nbytes)
    hot = layer_layout(replace(spec, ffn_width=num_hot), element_nbytes).nbytes if num_hot else whole.attention_nbytes
    return spec.num_layers * hot + MIN_SLOTS * whole.records_nbytes
