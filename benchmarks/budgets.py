"""Device memory that a benchmark gives a plan: as much as it asks for and the fewest slots, or a share of the model's layers."""

from __future__ import annotations

from offload_sirius.config import EngineConfig
from offload_sirius.engine import open_model
from offload_sirius.engine.placement import place
from offload_sirius.engine.planning import Planned
from offload_sirius.weights.plan import MIN_SLOTS, whole_nbytes

FOR_LAYERS = ("resident_layers", "attention", "hot_neurons", "slots", "neuron_cache")
"""What layers take of a plan's bill for the device; the rest every plan has."""


def fewest_slots_nbytes(config: EngineConfig) -> int:
    """Of the plan that has all neurons that a resident draft keeps, what is not slots, and the fewest of those."""
    placement = place(open_model(config.model).checkpoint, config)
    return placement.plan.device_nbytes - placement.plan.device_bill["slots"] + MIN_SLOTS * placement.layout.records_nbytes


def layers_share(planned: Planned) -> float:
    """What a device's budget leaves for layers and slots, over the bytes of all layers."""
    return (planned.budgets.device_nbytes - fixed_nbytes(planned)) / layers_nbytes(planned)


def share_nbytes(planned: Planned, share: float) -> int:
    """The device's budget that leaves so much."""
    return fixed_nbytes(planned) + int(share * layers_nbytes(planned))


def fixed_nbytes(planned: Planned) -> int:
    """Device bytes of all but layers and slots."""
    return planned.plan.device_nbytes - sum(planned.plan.device_bill.get(what, 0) for what in FOR_LAYERS)


def layers_nbytes(planned: Planned) -> int:
    """Of all layers, wherever they are."""
    return planned.layout.total(whole_nbytes, range(planned.spec.num_layers))
