"""What goes where when layers are partly resident: pure arithmetic, as plan.py. Knows no torch.

The device holds head, final norm, KV cache and activations, then all attention blocks, then as many hot neurons of each layer, an
equal number of all, as are asked for or fit. What is left beyond two slots of a whole layer's neurons goes to slots, too: they
hold what the link brings while a draft computes.

Where not even some neurons of every layer fit, or layers are to come first, as many layers as fit are hot, with the neurons that
are asked for, and stand evenly between the others, which pass through slots of a whole layer. A byte of a hot layer saves all of
itself in every pass; one of a layer that is resident as a whole saves in a draft step only what that brings of it, 0.6 where half
of the neurons are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from offload_sirius.errors import BudgetError
from offload_sirius.units import format_size
from offload_sirius.weights.layout import LayerLayout
from offload_sirius.weights.plan import (
    MIN_SLOTS,
    Budgets,
    Demand,
    HotPlan,
    Plan,
    as_flag,
    fixed_device_bill,
    nbytes_for_all_on_host,
    place_on_host,
    spread,
    whole_nbytes,
)
from offload_sirius_loaders.spec import ModelSpec

LEAST_HOT_SHARE = 1 / 16
"""Fewer of the layer's neurons make no draft that is worth its time."""

LEAST_HOT_LAYERS = 2
"""Fewer save next to nothing."""


@dataclass(frozen=True, kw_only=True)
class HotLayouts:
    """How the parts of a model lie whose hot layers each have that many hot neurons."""

    resident: LayerLayout
    """Attention block and hot neurons: a layer of N neurons."""
    whole: LayerLayout
    """All neurons, `kept` in the terms of a layout."""
    cold: LayerLayout
    """Those that are not hot, likewise."""


def hot_layouts(spec: ModelSpec, layout: LayerLayout, num_hot: int) -> HotLayouts:
    """Lay out residents and slots. layout: of a whole layer."""
    return HotLayouts(
        resident=layout.of(replace(spec, ffn_width=num_hot)),
        whole=layout.of(spec, spec.ffn_width),
        cold=layout.of(spec, spec.ffn_width - num_hot),
    )


def make_hot_plan(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets) -> Plan:
    """Place the model within the budgets. demand.num_hot: hot neurons of each layer that are asked for, below F.

    Raises BudgetError with the smallest budget that works.
    """
    fixed = fixed_device_bill(spec, layout, demand)
    left_nbytes = budgets.device_nbytes - sum(fixed.values())
    device = _split(spec, layout, demand, left_nbytes)
    if device is None:
        needed = least_hot_device_nbytes(spec, layout, demand)
        raise BudgetError(
            f"device budget {format_size(budgets.device_nbytes)} is too small for --draft resident: head, KV cache, activations, "
            f"{MIN_SLOTS} slots, attention blocks and neurons of some layers need {format_size(needed)}; give at least "
            f"--device-memory {as_flag(needed)}, or --draft streamed"
        )
    resident, hot_layers = device.layouts.resident, device.hot.layers
    host = place_on_host(spec, layout, demand, budgets, spec.num_layers)
    if host.num_disk_layers:
        needed = nbytes_for_all_on_host(spec, layout, demand, budgets, spec.num_layers)
        raise BudgetError(
            f"host budget {format_size(budgets.host_nbytes)} is too small for --draft resident, which needs all layers in host "
            f"memory: {format_size(needed)}; give at least --host-memory {as_flag(needed)}, or --draft streamed"
        )
    return Plan(
        resident_layers=(),
        host_layers=tuple(range(spec.num_layers)),
        disk_layers=(),
        num_slots=device.num_slots,
        num_host_buffers=host.num_buffers,
        kept_layers=(),
        num_cached_neurons=0,
        num_readers=host.num_readers,
        embedding_place=host.embedding_place,
        layer_nbytes=layout.nbytes,
        pass_nbytes=device.pass_nbytes(spec, layout),
        hot=device.hot,
        device_bill=fixed
        | {
            "resident_layers": 0,
            "attention": resident.total(lambda each: each.attention_nbytes, hot_layers),
            "hot_neurons": resident.total(lambda each: each.records_nbytes, hot_layers),
            "slots": device.slots_nbytes,
        },
        host_bill=host.bill,
    )


@dataclass(frozen=True, kw_only=True)
class _DeviceSplit:
    layouts: HotLayouts
    hot: HotPlan
    num_slots: int
    slots_nbytes: int

    def pass_nbytes(self, spec: ModelSpec, layout: LayerLayout) -> int:
        """What is cold of hot layers, and all of the others."""
        others = [layer for layer in range(spec.num_layers) if layer not in self.hot.layers]
        return self.layouts.cold.total(_kept_nbytes, self.hot.layers) + layout.total(whole_nbytes, others)


def _kept_nbytes(layout: LayerLayout) -> int:
    return layout.kept_nbytes


def _split(spec: ModelSpec, layout: LayerLayout, demand: Demand, left_nbytes: int) -> _DeviceSplit | None:
    """What the device holds; None where it has too little room."""
    every = _split_all(spec, layout, demand.num_hot, left_nbytes)
    if every is not None and (every.hot.num_hot == demand.num_hot or not demand.hot_layers_first):
        return every
    return _split_some(spec, layout, demand.num_hot, left_nbytes) or every


def _split_all(spec: ModelSpec, layout: LayerLayout, most_hot: int, left_nbytes: int) -> _DeviceSplit | None:
    """Every layer is hot, with as many neurons as there is room for; None where that is too few."""
    num_hot = _num_hot(spec, layout, most_hot, left_nbytes)
    if num_hot < _least_hot(spec, most_hot):
        return None
    layouts = hot_layouts(spec, layout, num_hot)
    most_nbytes = max(MIN_SLOTS * layouts.whole.kept_nbytes, spec.num_layers * layouts.cold.kept_nbytes)
    slots_nbytes = min(left_nbytes - layouts.resident.total(whole_nbytes, range(spec.num_layers)), most_nbytes)
    hot = HotPlan(
        layers=tuple(range(spec.num_layers)),
        num_hot=num_hot,
        num_cold_slots=min(slots_nbytes // layouts.cold.kept_nbytes, spec.num_layers),
        cold_nbytes=layouts.cold.mean(_kept_nbytes),
    )
    return _DeviceSplit(layouts=layouts, hot=hot, num_slots=slots_nbytes // layouts.whole.kept_nbytes, slots_nbytes=slots_nbytes)


def _split_some(spec: ModelSpec, layout: LayerLayout, num_hot: int, left_nbytes: int) -> _DeviceSplit | None:
    """As many layers are hot as there is room for, beside the fewest slots; None where that is too few.

    left >= hot layers * (attention block + hot neurons) + slots * layer
    """
    layouts, slots_nbytes = hot_layouts(spec, layout, num_hot), MIN_SLOTS * layout.nbytes
    # The ring is not to be longer than the layers are many of which a draft step brings something.
    num_layers = min((left_nbytes - slots_nbytes) // layouts.resident.nbytes, spec.num_layers - MIN_SLOTS)
    if num_layers < LEAST_HOT_LAYERS:
        return None
    streamed = set(spread(spec.num_layers, spec.num_layers - num_layers))
    hot = HotPlan(
        layers=tuple(layer for layer in range(spec.num_layers) if layer not in streamed),
        num_hot=num_hot,
        num_cold_slots=MIN_SLOTS,
        cold_nbytes=layouts.cold.mean(_kept_nbytes),
    )
    return _DeviceSplit(layouts=layouts, hot=hot, num_slots=MIN_SLOTS, slots_nbytes=slots_nbytes)


def _num_hot(spec: ModelSpec, layout: LayerLayout, most: int, left_nbytes: int) -> int:
    """Hot neurons of each layer for which there is room where all layers have some; 0 where there is room for none.

    left >= layers * (attention block + hot neurons) + slots * all neurons of a layer
    """
    room = left_nbytes - _all_nbytes(spec, layout, 0)
    num_hot = min(most, max(0, room) // (spec.num_layers * layout.neuron_nbytes))
    while num_hot and _all_nbytes(spec, layout, num_hot) > left_nbytes:  # alignment
        num_hot -= 1
    return num_hot


def _least_hot(spec: ModelSpec, most: int) -> int:
    """The fewest hot neurons of a layer that make a draft."""
    return min(most, max(1, int(spec.ffn_width * LEAST_HOT_SHARE)))


def least_hot_device_nbytes(spec: ModelSpec, layout: LayerLayout, demand: Demand) -> int:
    """Device bytes that a plan with hot layers takes at least."""
    return sum(fixed_device_bill(spec, layout, demand).values()) + _least_nbytes(spec, layout, demand.num_hot)


def _least_nbytes(spec: ModelSpec, layout: LayerLayout, most_hot: int) -> int:
    """Device bytes of the fewest hot layers, with all that are asked for of their neurons, and of the fewest slots; or of all
    layers with the fewest neurons, whichever is less."""
    all_nbytes = _all_nbytes(spec, layout, _least_hot(spec, most_hot))
    if spec.num_layers < LEAST_HOT_LAYERS + MIN_SLOTS:
        return all_nbytes
    resident_nbytes = hot_layouts(spec, layout, most_hot).resident.nbytes
    return min(all_nbytes, LEAST_HOT_LAYERS * resident_nbytes + MIN_SLOTS * layout.nbytes)


def _all_nbytes(spec: ModelSpec, layout: LayerLayout, num_hot: int) -> int:
    """Device bytes of all layers with that many hot neurons, and of the fewest slots."""
    hot = layout.of(replace(spec, ffn_width=num_hot)).nbytes if num_hot else layout.attention_nbytes
    return spec.num_layers * hot + MIN_SLOTS * layout.records_nbytes
