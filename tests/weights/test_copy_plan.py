"""What goes where when drafts compute on a quantised copy."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.errors import BudgetError
from offload_sirius.quantization import KINDS, Kind, WeightFormat
from offload_sirius.units import GIB, MIB, parse_size
from offload_sirius.weights.copy_plan import copy_layout, make_copy_plan
from offload_sirius.weights.layout import layer_layout
from offload_sirius.weights.plan import ROWS_QUANTISING_NBYTES, Budgets, Demand, ReadingCost
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:llama-3-70b").spec
LAYOUT = layer_layout(SPEC, 2)
F, LAYERS = 28_672, 80
INT4 = WeightFormat(kind="int4", group=32)
ROW = 4096 + 3 * 256 + 16
FIXED = 2 * 1_050_673_152 + 2 * 8192 + 400 * MIB
DEMAND = Demand(
    kv_cache_nbytes=299 * MIB,
    position_tables_nbytes=MIB,
    activation_nbytes=100 * MIB,
    reading=ReadingCost(reader_nbytes=8 * MIB, placer_nbytes=0, num_cores=1),
    embedding_on_device=False,
    staged=False,
    rows_quantising_nbytes=ROWS_QUANTISING_NBYTES,
    num_hot=F,
    draft_format=INT4,
)


def test_all_neurons_are_copied_where_there_is_room_and_the_rest_of_it_is_slots() -> None:
    copy = LAYERS * (10 * 1024 * ROW + 8192 * ROW + 2 * 8192 * 2 + 3 * F * ROW)
    made = make_copy_plan(SPEC, LAYOUT, DEMAND, Budgets(device_nbytes=FIXED + copy + 3 * LAYOUT.nbytes, host_nbytes=160 * GIB))
    assert made.hot is not None
    assert (made.hot.num_hot, made.hot.layers, made.hot.draft_format) == (F, tuple(range(LAYERS)), INT4)
    assert made.device_bill["attention"] + made.device_bill["hot_neurons"] == copy
    assert (made.num_slots, made.device_bill["slots"]) == (3, 3 * LAYOUT.nbytes)
    assert made.pass_nbytes == LAYERS * LAYOUT.nbytes, "a correction shares nothing with the copy"
    assert made.host_bill["quantising"] == ROWS_QUANTISING_NBYTES
    assert made.device_nbytes == FIXED + copy + 3 * LAYOUT.nbytes


@given(st.sampled_from(KINDS), st.integers(0, 90 * GIB))
def test_as_many_neurons_are_copied_as_fit_and_none_more(kind: Kind, device_nbytes: int) -> None:
    form = WeightFormat(kind=kind, group=32)
    demand, budgets = replace(DEMAND, draft_format=form), Budgets(device_nbytes=device_nbytes, host_nbytes=160 * GIB)
    try:
        made = make_copy_plan(SPEC, LAYOUT, demand, budgets)
    except BudgetError as error:
        found = re.search(r"--device-memory (\S+),", str(error))
        assert found is not None
        needed = parse_size(found[1]).nbytes
        assert needed is not None
        assert needed > device_nbytes
        assert make_copy_plan(SPEC, LAYOUT, demand, replace(budgets, device_nbytes=needed)).hot is not None
        return
    assert made.hot is not None
    assert made.device_nbytes <= device_nbytes
    assert 2 <= made.num_slots <= LAYERS
    if made.hot.num_hot < F:
        one_more = copy_layout(SPEC, LAYOUT, form, made.hot.num_hot + 1).nbytes
        assert FIXED + LAYERS * one_more + 2 * LAYOUT.nbytes > device_nbytes


def test_layers_that_would_stay_on_disk_are_refused_and_what_is_said_to_do_does() -> None:
    budgets = Budgets(device_nbytes=60 * GIB, host_nbytes=100 * GIB)
    with pytest.raises(BudgetError, match=r"--draft-quantize int4, which needs all layers in host memory") as caught:
        make_copy_plan(SPEC, LAYOUT, DEMAND, budgets)
    needed = parse_size(str(caught.value).partition("at least --host-memory ")[2].partition(",")[0]).nbytes
    assert needed is not None
    assert make_copy_plan(SPEC, LAYOUT, DEMAND, replace(budgets, host_nbytes=needed)).disk_layers == ()
