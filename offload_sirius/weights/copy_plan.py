"""What goes where when drafts compute on a quantised copy of the model: pure arithmetic, as plan.py. Knows no torch.

The device holds head, final norm, KV cache and activations, then a copy of all attention blocks and of as many neurons of each
layer as fit, an equal number of all. The target's own layers all pass in a correction, and what is left of the device beyond two
slots for them goes to slots, too: they hold what the link brings while a draft computes.

Attention blocks are copied and not kept as the target's own. Those of the target would save a correction their bytes, a sixth of
a layer in the shape of Llama-3-70B, but take two to four times the room, which as neurons of the copy is worth more tokens.
"""

from __future__ import annotations

from dataclasses import replace

from offload_sirius.errors import BudgetError
from offload_sirius.quantization import WeightFormat
from offload_sirius.units import format_size
from offload_sirius.weights.hot_plan import LEAST_HOT_SHARE
from offload_sirius.weights.layout import LayerLayout, layer_layout
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
)
from offload_sirius_loaders.spec import ModelSpec


def copy_layout(spec: ModelSpec, layout: LayerLayout, draft_format: WeightFormat, num_copied: int) -> LayerLayout:
    """A layer of the copy, with so many neurons. layout: of the target's layers."""
    return layer_layout(replace(spec, ffn_width=num_copied), layout.element_nbytes, 0, draft_format)


def make_copy_plan(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets) -> Plan:
    """Place model and copy within the budgets. demand.num_hot: neurons of each layer that are copied if there is room.

    Raises BudgetError with the smallest budget that works.
    """
    assert demand.draft_format is not None
    fixed = fixed_device_bill(spec, layout, demand)
    left_nbytes = budgets.device_nbytes - sum(fixed.values())
    num_copied = _num_copied(spec, layout, demand, left_nbytes)
    if num_copied < _least_copied(demand):
        needed = least_copy_device_nbytes(spec, layout, demand)
        raise BudgetError(
            f"device budget {format_size(budgets.device_nbytes)} is too small for --draft-quantize {demand.draft_format.kind}: "
            f"head, KV cache, activations, {MIN_SLOTS} layer slots, and a copy of the attention blocks and some neurons need "
            f"{format_size(needed)}; give at least --device-memory {as_flag(needed)}, or --draft-quantize none"
        )
    host = place_on_host(spec, layout, demand, budgets, spec.num_layers)
    if host.num_disk_layers:
        needed = nbytes_for_all_on_host(spec, layout, demand, budgets, spec.num_layers)
        raise BudgetError(
            f"host budget {format_size(budgets.host_nbytes)} is too small for --draft-quantize {demand.draft_format.kind}, which "
            f"needs all layers in host memory: {format_size(needed)}; give at least --host-memory {as_flag(needed)}, or "
            "--draft-quantize none"
        )
    copy = copy_layout(spec, layout, demand.draft_format, num_copied)
    num_slots = min(spec.num_layers, (left_nbytes - spec.num_layers * copy.nbytes) // layout.nbytes)
    layers = tuple(range(spec.num_layers))
    return Plan(
        resident_layers=(),
        host_layers=layers,
        disk_layers=(),
        num_slots=num_slots,
        num_host_buffers=host.num_buffers,
        kept_layers=(),
        num_cached_neurons=0,
        num_readers=host.num_readers,
        embedding_place=host.embedding_place,
        layer_nbytes=layout.nbytes,
        pass_nbytes=spec.num_layers * layout.nbytes,
        hot=HotPlan(
            layers=layers,
            num_hot=num_copied,
            num_cold_slots=num_slots,
            cold_nbytes=layout.nbytes,
            draft_format=demand.draft_format,
        ),
        device_bill=fixed
        | {
            "resident_layers": 0,
            "attention": spec.num_layers * copy.attention_nbytes,
            "hot_neurons": spec.num_layers * copy.records_nbytes,
            "slots": num_slots * layout.nbytes,
        },
        host_bill=host.bill,
    )


def _num_copied(spec: ModelSpec, layout: LayerLayout, demand: Demand, left_nbytes: int) -> int:
    """Neurons of each layer that are copied; 0 where there is room for none.

    left >= layers * copy of a layer + slots * layer
    """
    assert demand.draft_format is not None
    neuron_nbytes = 3 * demand.draft_format.row_nbytes(spec.width)
    room = left_nbytes - _nbytes(spec, layout, demand.draft_format, 0)
    num_copied = min(demand.num_hot, max(0, room) // (spec.num_layers * neuron_nbytes))
    while num_copied and _nbytes(spec, layout, demand.draft_format, num_copied) > left_nbytes:  # alignment
        num_copied -= 1
    return num_copied


def _least_copied(demand: Demand) -> int:
    """The fewest neurons of a layer that make a draft."""
    return max(1, int(demand.num_hot * LEAST_HOT_SHARE))


def least_copy_device_nbytes(spec: ModelSpec, layout: LayerLayout, demand: Demand) -> int:
    """Device bytes that a plan with a copy takes at least."""
    assert demand.draft_format is not None
    copied_nbytes = _nbytes(spec, layout, demand.draft_format, _least_copied(demand))
    return sum(fixed_device_bill(spec, layout, demand).values()) + copied_nbytes


def _nbytes(spec: ModelSpec, layout: LayerLayout, draft_format: WeightFormat, num_copied: int) -> int:
    """Device bytes of the copy, and of the fewest slots."""
    copy = copy_layout(spec, layout, draft_format, max(1, num_copied))
    nbytes = copy.nbytes if num_copied else copy.attention_nbytes
    return spec.num_layers * nbytes + min(MIN_SLOTS, spec.num_layers) * layout.nbytes
