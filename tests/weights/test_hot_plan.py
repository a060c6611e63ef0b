"""What goes where when layers are partly resident."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.blocks import BLOCK_FORMATS, BlockFormat
from offload_sirius.errors import BudgetError
from offload_sirius.units import GIB, MIB, parse_size
from offload_sirius.weights.hot_plan import LEAST_HOT_LAYERS, LEAST_HOT_SHARE, hot_layouts, make_hot_plan
from offload_sirius.weights.layout import LayerLayout, layer_layout, model_layout
from offload_sirius.weights.plan import MIN_SLOTS, Budgets, Demand, Plan, ReadingCost, fixed_device_bill
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.spec import ModelSpec, Role

SPEC = open_checkpoint("synthetic:llama-3-70b").spec
LAYOUT = layer_layout(SPEC, 2)
F, LAYERS = 28_672, 80
NEURON = 3 * 8192 * 2
ATTENTION, RECORDS = 2 * (150_994_944 + 16_384), F * NEURON
HEAD = 2 * 1_050_673_152
FIXED = HEAD + 2 * 8192 + 300 * MIB + 100 * MIB + LAYERS * F * 12
READER = 8 * MIB
KEEP_HALF = F // 2

DEMAND = Demand(
    kv_cache_nbytes=299 * MIB,
    position_tables_nbytes=MIB,
    activation_nbytes=100 * MIB,
    reading=ReadingCost(reader_nbytes=READER, placer_nbytes=0, num_cores=1),
    embedding_on_device=False,
    staged=False,
    sparsity_nbytes=LAYERS * F * 12,
    num_hot=KEEP_HALF,
)
SPECS = [open_checkpoint(f"synthetic:{name}").spec for name in ("llama-3-70b", "tinyllama-1.1b", "tiny?ffn=40", "tiny?layers=1")]


def plan(device_nbytes: int, host_nbytes: int = 200 * GIB, **more: Any) -> Plan:
    return make_hot_plan(SPEC, LAYOUT, replace(DEMAND, **more), Budgets(device_nbytes=device_nbytes, host_nbytes=host_nbytes))


def num_hot(made: Plan) -> int:
    """Of each layer, all of which have some."""
    assert made.hot is not None
    assert made.hot.layers == made.host_layers
    return made.hot.num_hot


def test_half_of_the_neurons_are_hot_where_there_is_room_and_the_rest_of_it_is_slots() -> None:
    made = plan(FIXED + LAYERS * (ATTENTION + KEEP_HALF * NEURON) + 3 * RECORDS)
    assert num_hot(made) == KEEP_HALF
    assert made.device_bill["attention"] == LAYERS * ATTENTION
    assert made.device_bill["hot_neurons"] == LAYERS * KEEP_HALF * NEURON
    assert made.device_bill["slots"] == 3 * RECORDS
    assert made.hot is not None
    assert (made.num_slots, made.hot.num_cold_slots, made.hot.cold_nbytes) == (3, 6, (F - KEEP_HALF) * NEURON)
    assert made.pass_nbytes == LAYERS * (F - KEEP_HALF) * NEURON
    assert (made.host_layers, made.resident_layers, made.disk_layers) == (tuple(range(LAYERS)), (), ())


def test_with_less_room_fewer_are_hot_and_there_are_two_slots() -> None:
    made = plan(FIXED + LAYERS * ATTENTION + 2 * RECORDS + LAYERS * 5000 * NEURON + LAYERS * NEURON - 1)
    assert num_hot(made) == 5000
    assert made.num_slots == 2
    assert made.device_bill["slots"] == 2 * RECORDS + LAYERS * NEURON - 1, "what makes no neuron more is for slots"


FEWEST = int(F * LEAST_HOT_SHARE)
BUDGETS = {
    "attention and the fewest neurons": (FIXED + LAYERS * (ATTENTION + FEWEST * NEURON) + 2 * RECORDS, FEWEST, 2),
    "a quarter": (FIXED + LAYERS * (ATTENTION + F // 4 * NEURON) + 2 * RECORDS, F // 4, 2),
    "a half": (FIXED + LAYERS * (ATTENTION + F // 2 * NEURON) + 2 * RECORDS, F // 2, 4),
    "three quarters": (FIXED + LAYERS * (ATTENTION + F * 3 // 4 * NEURON) + 2 * RECORDS, F * 3 // 4, 8),
    "nearly everything": (FIXED + LAYERS * (ATTENTION + (F - 1) * NEURON) + 2 * RECORDS, F - 1, LAYERS),
}


@pytest.mark.parametrize(("device_nbytes", "expected", "num_cold_slots"), BUDGETS.values(), ids=list(BUDGETS))
def test_from_the_least_to_nearly_all_each_byte_of_the_budget_is_used(
    device_nbytes: int, expected: int, num_cold_slots: int
) -> None:
    made = plan(device_nbytes, num_hot=F - 1)
    assert num_hot(made) == expected
    assert made.device_nbytes == device_nbytes
    assert made.hot is not None
    assert made.hot.num_cold_slots == num_cold_slots
    assert num_hot(plan(device_nbytes + LAYERS * NEURON, num_hot=F - 1)) == min(expected + 1, F - 1)


HOT_LAYER = ATTENTION + KEEP_HALF * NEURON
LAYER = ATTENTION + RECORDS
LEAST = FIXED + LEAST_HOT_LAYERS * HOT_LAYER + 2 * LAYER


@pytest.mark.parametrize(("num_layers", "rest"), [(2, 0), (3, HOT_LAYER - 1), (18, 100 * MIB), (28, 0)])
def test_where_not_all_layers_can_have_hot_neurons_some_have_all_that_are_asked_for(num_layers: int, rest: int) -> None:
    made = plan(FIXED + num_layers * HOT_LAYER + 2 * LAYER + rest)
    assert made.hot is not None
    assert (len(made.hot.layers), made.hot.num_hot) == (num_layers, KEEP_HALF)
    assert (made.device_bill["attention"], made.device_bill["slots"]) == (num_layers * ATTENTION, 2 * LAYER)
    assert made.device_bill["hot_neurons"] == num_layers * KEEP_HALF * NEURON
    assert made.device_nbytes == FIXED + num_layers * HOT_LAYER + 2 * LAYER
    assert (made.num_slots, made.hot.num_cold_slots, made.hot.cold_nbytes) == (2, 2, (F - KEEP_HALF) * NEURON)
    assert made.pass_nbytes == num_layers * (F - KEEP_HALF) * NEURON + (LAYERS - num_layers) * LAYER
    assert (made.host_layers, made.resident_layers, made.disk_layers) == (tuple(range(LAYERS)), (), ())


def test_where_layers_come_first_some_have_all_that_are_asked_for_though_every_layer_could_have_fewer() -> None:
    budget = FIXED + LAYERS * (ATTENTION + 5296 * NEURON) + 2 * RECORDS
    neurons, layers = plan(budget), plan(budget, hot_layers_first=True)
    assert neurons.hot is not None
    assert layers.hot is not None
    assert (len(neurons.hot.layers), neurons.hot.num_hot) == (LAYERS, 5296)
    num_layers = (budget - FIXED - 2 * LAYER) // HOT_LAYER
    assert (len(layers.hot.layers), layers.hot.num_hot) == (num_layers, KEEP_HALF)
    assert num_layers < LAYERS - 2


@pytest.mark.parametrize("hot_layers_first", [True, False])
def test_where_all_that_is_asked_for_fits_nothing_comes_first(hot_layers_first: bool) -> None:
    made = plan(FIXED + LAYERS * HOT_LAYER + 2 * RECORDS, hot_layers_first=hot_layers_first)
    assert made.hot is not None
    assert (len(made.hot.layers), made.hot.num_hot) == (LAYERS, KEEP_HALF)


@pytest.mark.parametrize("downs", [("Q5_K", "Q4_1"), ("Q6_K", "Q5_1")])
def test_a_table_of_fewer_bits_that_is_larger_takes_no_slot(downs: tuple[str, str]) -> None:
    kinds: list[dict[Role, BlockFormat]] = [{"down": BLOCK_FORMATS[name]} for name in downs]
    layout = model_layout(SPEC, 2, 0, None, [kinds[layer > 0] for layer in range(LAYERS)])
    resident = layout.of(replace(SPEC, ffn_width=FEWEST)).nbytes
    needed = sum(fixed_device_bill(SPEC, layout, DEMAND).values()) + LAYERS * resident + MIN_SLOTS * layout.records_nbytes
    made = make_hot_plan(SPEC, layout, DEMAND, Budgets(device_nbytes=needed, host_nbytes=400 * GIB))
    assert num_hot(made) == FEWEST
    assert made.num_slots >= MIN_SLOTS
    assert made.device_nbytes <= needed


def test_hot_layers_stand_evenly_between_the_others() -> None:
    made = plan(FIXED + 20 * HOT_LAYER + 2 * LAYER)
    assert made.hot is not None
    assert made.hot.layers == tuple(range(0, LAYERS, 4))


def test_a_draft_that_takes_few_neurons_may_have_all_layers_hot_but_two() -> None:
    few = replace(DEMAND, num_hot=100)
    all_nbytes = FIXED + LAYERS * (ATTENTION + 100 * NEURON) + 2 * RECORDS
    made = make_hot_plan(SPEC, LAYOUT, few, Budgets(device_nbytes=all_nbytes, host_nbytes=200 * GIB))
    assert num_hot(made) == 100
    made = make_hot_plan(SPEC, LAYOUT, few, Budgets(device_nbytes=all_nbytes - 1, host_nbytes=200 * GIB))
    assert made.hot is not None
    assert len(made.hot.layers) == LAYERS - 2
    assert made.device_nbytes == FIXED + 78 * (ATTENTION + 100 * NEURON) + 2 * LAYER == all_nbytes - 200 * NEURON


def test_slots_take_no_more_than_all_cold_neurons_of_all_layers() -> None:
    made = plan(400 * GIB)
    assert made.hot is not None
    assert made.hot.num_cold_slots == LAYERS
    assert made.device_bill["slots"] == LAYERS * (F - KEEP_HALF) * NEURON


def refused(spec: ModelSpec, layout: LayerLayout, demand: Demand, budgets: Budgets) -> str | None:
    """Why there is no plan; None where there is one."""
    try:
        make_hot_plan(spec, layout, demand, budgets)
    except BudgetError as error:
        return str(error)
    return None


def said(refusal: str) -> tuple[str, int]:
    """The flag that would do, and its size."""
    found = re.search(r"give at least --(device|host)-memory ([^ ,]+)", refusal)
    assert found, refusal
    nbytes = parse_size(found[2]).nbytes
    assert nbytes is not None
    return found[1], nbytes


@given(
    spec=st.sampled_from(SPECS),
    element_nbytes=st.sampled_from([2, 4]),
    keep=st.floats(0, 1),
    device_share=st.floats(0, 2),
    host_share=st.floats(0, 2),
    staged=st.booleans(),
    tied=st.booleans(),
)
def test_a_plan_keeps_to_its_budgets_and_one_that_is_refused_says_which_would_do(
    spec: Any, element_nbytes: int, keep: float, device_share: float, host_share: float, staged: bool, tied: bool
) -> None:
    layout = layer_layout(spec, element_nbytes)
    most = min(max(1, int(keep * spec.ffn_width)), spec.ffn_width - 1)
    demand = replace(DEMAND, num_hot=most, sparsity_nbytes=12 * spec.num_layers * spec.ffn_width, staged=staged)
    demand = replace(demand, embedding_on_device=tied)
    model_nbytes = spec.num_layers * layout.nbytes + 2 * spec.vocab_size * spec.width * element_nbytes + 500 * MIB
    budgets = Budgets(device_nbytes=int(device_share * model_nbytes), host_nbytes=int(host_share * model_nbytes))
    for _ in range(3):  # one for the device, one for reading weights, one for the layers in host memory
        refusal = refused(spec, layout, demand, budgets)
        if refusal is None:
            break
        flag, nbytes = said(refusal)
        assert nbytes > getattr(budgets, f"{flag}_nbytes")
        budgets = replace(budgets, **{f"{flag}_nbytes": nbytes})
    made = make_hot_plan(spec, layout, demand, budgets)
    assert made.hot is not None
    assert made.device_nbytes <= budgets.device_nbytes
    assert made.host_nbytes <= budgets.host_nbytes
    assert 1 <= made.hot.num_hot <= most
    layouts = hot_layouts(spec, layout, made.hot.num_hot)
    slots, num_hot_layers = made.device_bill["slots"], len(made.hot.layers)
    if num_hot_layers < spec.num_layers:
        assert made.hot.num_hot == most
        assert LEAST_HOT_LAYERS <= num_hot_layers <= spec.num_layers - made.num_slots
        assert slots == made.num_slots * layout.nbytes
    assert made.device_bill["attention"] + made.device_bill["hot_neurons"] == num_hot_layers * layouts.resident.nbytes
    assert made.num_slots >= 2
    assert made.num_slots * layouts.whole.kept_nbytes <= slots
    assert made.hot.num_cold_slots * layouts.cold.kept_nbytes <= slots
    assert min(2, spec.num_layers) <= made.hot.num_cold_slots <= spec.num_layers
    assert made.hot.cold_nbytes == layouts.cold.kept_nbytes


@given(spec=st.sampled_from(SPECS), shares=st.lists(st.floats(0, 2), min_size=2, max_size=6))
def test_more_device_memory_never_makes_less_resident(spec: Any, shares: list[float]) -> None:
    layout = layer_layout(spec, 4)
    demand = replace(DEMAND, num_hot=spec.ffn_width * 3 // 4)
    model_nbytes = spec.num_layers * layout.nbytes + spec.vocab_size * spec.width * 4 + 500 * MIB
    budgets = [Budgets(device_nbytes=int(share * model_nbytes), host_nbytes=1 << 50) for share in sorted(shares)]
    refusals = [refused(spec, layout, demand, each) for each in budgets]
    bills = [
        {} if refusal else make_hot_plan(spec, layout, demand, each).device_bill
        for each, refusal in zip(budgets, refusals, strict=True)
    ]
    found = [bill.get("attention", 0) + bill.get("hot_neurons", 0) for bill in bills]
    assert found == sorted(found)


def test_too_little_device_memory_is_one_line_that_says_how_much_would_do() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(LEAST - 1)
    assert str(caught.value) == (
        "device budget 7.44 GiB is too small for --draft resident: head, KV cache, activations, 2 slots, attention blocks and "
        "neurons of some layers need 7.44 GiB; give at least --device-memory 7.44GiB, or --draft streamed"
    )
    made = plan(LEAST)
    assert made.hot is not None
    assert len(made.hot.layers) == 2


def test_too_little_host_memory_is_one_line_that_says_how_much_would_do() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(40 * GIB, 100 * GIB)
    assert str(caught.value) == (
        "host budget 100.00 GiB is too small for --draft resident, which needs all layers in host memory: 129.71 GiB; "
        "give at least --host-memory 129.71GiB, or --draft streamed"
    )


@pytest.mark.parametrize(
    ("host_nbytes", "staged"),
    [(GIB // 2, False), (GIB, False), (3 * GIB, False), (4 * GIB, True), (50 * GIB, False), (50 * GIB, True), (128 * GIB, True)],
)
def test_the_host_memory_that_is_said_to_do_does(host_nbytes: int, staged: bool) -> None:
    with pytest.raises(BudgetError, match="--draft resident, which needs all layers in host memory") as caught:
        plan(40 * GIB, host_nbytes, staged=staged)
    _, nbytes = said(str(caught.value))
    made = plan(40 * GIB, nbytes, staged=staged)
    assert made.host_nbytes == pytest.approx(nbytes, rel=0.01), "and hardly less would"


def test_layers_that_share_host_buffers_are_all_in_host_memory() -> None:
    made = plan(40 * GIB, 40 * GIB, num_shared_buffers=8)
    assert (len(made.host_layers), made.num_host_buffers) == (LAYERS, 8)
