"""What goes where, by hand-computed bytes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.errors import BudgetError
from offload_sirius.units import GIB, MIB, parse_size
from offload_sirius.weights.layout import layer_layout
from offload_sirius.weights.plan import MAX_READERS, MIN_READERS, Budgets, Demand, Plan, ReadingCost, make_plan, spread
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:llama-3-70b").spec
LAYOUT = layer_layout(SPEC, 2)
LAYER = 2 * (150_994_944 + 704_643_072 + 16_384)
HEAD = 2 * 1_050_673_152
FIXED = HEAD + 2 * 8192 + 300 * MIB + 100 * MIB
READER = 8 * MIB

READING = ReadingCost(reader_nbytes=4 * MIB, placer_nbytes=3 * MIB, num_cores=4)


@pytest.mark.parametrize(("num_readers", "nbytes"), [(2, 2 * 7 * MIB), (4, 4 * 7 * MIB), (32, 140 * MIB)])
def test_as_many_readers_as_there_is_room_for_and_behind_them_one_a_core(num_readers: int, nbytes: int) -> None:
    assert READING.nbytes(num_readers) == nbytes
    assert READING.num_readers(nbytes) == num_readers
    assert READING.num_readers(nbytes - 1) == max(num_readers - 1, MIN_READERS)


def test_there_are_never_more_readers_than_32() -> None:
    assert READING.num_readers(10 * GIB) == MAX_READERS


def demand(*, tied: bool = False, staged: bool = False) -> Demand:
    return Demand(
        kv_cache_nbytes=299 * MIB,
        position_tables_nbytes=MIB,
        activation_nbytes=100 * MIB,
        reading=ReadingCost(reader_nbytes=READER, placer_nbytes=0, num_cores=1),
        embedding_on_device=tied,
        staged=staged,
    )


def plan(device_nbytes: int, host_nbytes: int, **more: bool) -> Plan:
    return make_plan(SPEC, LAYOUT, demand(**more), Budgets(device_nbytes=device_nbytes, host_nbytes=host_nbytes))


def test_a_24_gib_card_keeps_what_fits_and_streams_the_rest_through_two_slots() -> None:
    made = plan(24 * GIB, 200 * GIB)
    room = (24 * GIB - FIXED) // LAYER
    assert made.num_slots == 2
    assert len(made.resident_layers) == room - 2 == 11
    assert made.pass_nbytes == (80 - 11) * LAYER
    assert made.device_bill["resident_layers"] == 11 * LAYER
    assert made.device_nbytes == FIXED + 13 * LAYER


def test_everything_is_resident_where_it_fits_and_then_there_are_no_slots() -> None:
    made = plan(FIXED + 80 * LAYER, 10 * GIB)
    assert made.resident_layers == tuple(range(80))
    assert (made.num_slots, made.pass_nbytes) == (0, 0)


def test_one_byte_less_and_the_model_is_streamed() -> None:
    made = plan(FIXED + 80 * LAYER - 1, 200 * GIB)
    assert len(made.resident_layers) == 77
    assert made.num_slots == 2


def test_what_host_memory_does_not_hold_stays_on_disk() -> None:
    made = plan(24 * GIB, 64 * GIB)
    layers_room = 64 * GIB - 32 * READER - HEAD
    assert len(made.host_layers) == layers_room // LAYER
    assert len(made.host_layers) + len(made.disk_layers) + len(made.resident_layers) == 80
    assert made.embedding_place == "host"


def test_the_embedding_is_read_from_disk_where_host_memory_is_too_small_for_it() -> None:
    assert plan(24 * GIB, 1 * GIB).embedding_place == "disk"


def test_a_tied_embedding_is_taken_from_the_head() -> None:
    made = plan(24 * GIB, 64 * GIB, tied=True)
    assert made.embedding_place == "device"
    assert made.host_bill["embedding"] == 0


@pytest.mark.parametrize(
    ("device_nbytes", "host_nbytes", "staging_nbytes"),
    [
        (24 * GIB, 200 * GIB, 32 * MIB),  # every streamed layer is in the arena, two of which serve while it is filled
        (24 * GIB, 64 * GIB, 32 * MIB + 2 * LAYER),  # some come from disk, in every pass
        (200 * GIB, 10 * GIB, 32 * MIB + 2 * LAYER),  # residents only
    ],
)
def test_staging_buffers_are_on_the_bill_of_a_device_with_memory_of_its_own(
    device_nbytes: int, host_nbytes: int, staging_nbytes: int
) -> None:
    assert plan(device_nbytes, host_nbytes, staged=True).host_bill["staging"] == staging_nbytes


def test_pinned_memory_is_hardly_more_than_what_is_streamed_from_it() -> None:
    made = plan(24 * GIB, 200 * GIB, staged=True)
    assert made.host_bill["layers"] + made.host_bill["staging"] <= 1.02 * made.pass_nbytes


def test_shared_buffers_hold_every_streamed_layer_of_a_shape_that_exceeds_memory() -> None:
    needs = replace(demand(staged=True), num_shared_buffers=8)
    made = make_plan(SPEC, LAYOUT, needs, Budgets(device_nbytes=24 * GIB, host_nbytes=64 * GIB))
    assert len(made.host_layers) == 69
    assert made.disk_layers == ()
    assert made.host_bill["layers"] == 8 * LAYER
    assert made.num_host_buffers == 8


def test_shared_buffers_for_which_there_is_no_room_are_refused() -> None:
    needs = replace(demand(), num_shared_buffers=8)
    with pytest.raises(BudgetError, match=r"room for \d shared buffers of 1.60 GiB, 8 are asked for; give a larger "):
        make_plan(SPEC, LAYOUT, needs, Budgets(device_nbytes=24 * GIB, host_nbytes=8 * GIB))


def test_small_layers_get_more_slots_so_that_the_head_does_not_idle_the_link() -> None:
    spec = open_checkpoint("synthetic:tinyllama-1.1b").spec
    layout = layer_layout(spec, 2)
    made = make_plan(spec, layout, demand(), Budgets(device_nbytes=2 * GIB, host_nbytes=100 * MIB))
    assert made.disk_layers
    assert made.num_slots == 1 + -(-256 * MIB // layout.nbytes) == 5


@pytest.mark.parametrize("device_nbytes", [1, HEAD, FIXED + 2 * LAYER - 1])
def test_a_device_budget_below_two_slots_is_refused_with_one_that_works(device_nbytes: int) -> None:
    with pytest.raises(BudgetError, match=r"^device budget .* is too small: .* give at least --device-memory \S+") as caught:
        plan(device_nbytes, 200 * GIB)
    flag = re.search(r"--device-memory (\S+)$", str(caught.value))
    assert flag is not None
    minimum = parse_size(flag[1]).nbytes
    assert minimum is not None
    assert plan(minimum, 200 * GIB).device_nbytes <= minimum < (FIXED + 2 * LAYER) * 1.01


def test_a_host_budget_below_two_readers_is_refused_with_one_that_works() -> None:
    with pytest.raises(BudgetError, match=r"^host budget 15.00 MiB is too small: .* give at least --host-memory 16.00MiB"):
        plan(24 * GIB, 15 * MIB)
    assert plan(24 * GIB, 16 * MIB).host_nbytes <= 16 * MIB


@given(
    st.integers(FIXED + 2 * LAYER, FIXED + 90 * LAYER),
    st.one_of(st.integers(2 * READER, 8 * GIB), st.integers(8 * GIB, 200 * GIB)),
    st.booleans(),
)
def test_a_plan_stays_within_its_budgets_and_places_each_layer_once(device_nbytes: int, host_nbytes: int, staged: bool) -> None:
    host_nbytes += 32 * MIB + 2 * LAYER if staged else 0
    made = plan(device_nbytes, host_nbytes, staged=staged)
    assert made.device_nbytes <= device_nbytes
    assert made.host_nbytes <= host_nbytes
    assert sorted(made.resident_layers + made.host_layers + made.disk_layers) == list(range(80))
    assert made.num_slots >= 2 or not made.streamed_layers


def test_resident_layers_stand_between_streamed_ones() -> None:
    assert spread(8, 4) == (1, 3, 5, 7)
    assert spread(5, 2) == (2, 4)
    assert spread(3, 0) == ()


@given(st.integers(1, 200), st.data())
def test_spreading_chooses_as_many_as_asked_with_gaps_that_differ_by_one(num_all: int, data: st.DataObject) -> None:
    num_chosen = data.draw(st.integers(0, num_all))
    chosen = spread(num_all, num_chosen)
    gaps = {after - before for before, after in pairwise(chosen)}
    assert len(chosen) == num_chosen
    assert not gaps or max(gaps) - min(gaps) <= 1


# Sparse steps.

NUM_KEPT = 28672 // 2
KEPT_LAYOUT = layer_layout(SPEC, 2, NUM_KEPT)
KEPT = 3 * NUM_KEPT * 8192 * 2
RECORD = 2 * 8192 * 2
CACHED = RECORD + 16
"""A record, and two numbers of 8 bytes that say whose it is and when it was needed."""
FLAGS = 28672 + 1
"""A byte for each neuron of a layer and one for nobody, in each cache."""
SPARSITY = 5 * MIB


def plan_kept(device_nbytes: int, host_nbytes: int, *, staged: bool = False) -> Plan:
    needs = replace(demand(staged=staged), sparsity_nbytes=SPARSITY)
    return make_plan(SPEC, KEPT_LAYOUT, needs, Budgets(device_nbytes=device_nbytes, host_nbytes=host_nbytes))


def plan_cached(device_nbytes: int, host_nbytes: int, num_cached: int = NUM_KEPT, *, staged: bool = False) -> Plan:
    needs = replace(demand(staged=staged), num_cached_neurons=num_cached)
    return make_plan(SPEC, LAYOUT, needs, Budgets(device_nbytes=device_nbytes, host_nbytes=host_nbytes))


def test_choosing_neurons_is_on_the_device_s_bill() -> None:
    made = plan_kept(24 * GIB, 200 * GIB)
    assert made.device_bill["sparsity"] == SPARSITY
    assert made.device_nbytes == FIXED + SPARSITY + 13 * LAYER


def test_where_all_layers_are_in_host_memory_kept_neurons_take_what_is_left() -> None:
    room = 32 * READER + HEAD + 69 * LAYER
    for num_kept in (0, 1, 40, 69, 80):
        made = plan_kept(24 * GIB, room + num_kept * KEPT)
        assert (len(made.host_layers), made.disk_layers) == (69, ())
        assert len(made.kept_layers) == min(num_kept, 69)
        assert set(made.kept_layers) <= set(made.host_layers)
        assert made.host_bill["kept_neurons"] == min(num_kept, 69) * KEPT
        assert made.sliceable_layers == made.streamed_layers


def test_where_some_layers_stay_on_disk_their_kept_neurons_come_first_and_fewer_layers_are_in_host_memory() -> None:
    plain, made = plan(24 * GIB, 64 * GIB), plan_kept(24 * GIB, 64 * GIB)
    room = 64 * GIB - 32 * READER - HEAD
    # room >= host * layer + (streamed - host) * kept
    num_streamed = len(made.streamed_layers)
    num_host = (room - num_streamed * KEPT) // (LAYER - KEPT)
    assert len(made.host_layers) == num_host < len(plain.host_layers)
    assert set(made.disk_layers) <= set(made.kept_layers)
    assert made.sliceable_layers == made.streamed_layers
    assert made.host_bill["layers"] == num_host * LAYER
    assert made.host_bill["kept_neurons"] == len(made.kept_layers) * KEPT


def test_where_there_is_no_room_for_all_kept_neurons_no_layer_is_in_host_memory() -> None:
    made = plan_kept(24 * GIB, 12 * GIB)
    assert made.host_layers == ()
    room = 12 * GIB - 32 * READER - HEAD
    assert len(made.kept_layers) == room // KEPT < len(made.disk_layers)
    assert made.sliceable_layers == made.kept_layers


def test_full_passes_keep_nothing() -> None:
    made = plan(24 * GIB, 64 * GIB)
    assert (made.kept_layers, made.num_cached_neurons) == ((), 0)
    assert (made.host_bill["kept_neurons"], made.device_bill["neuron_cache"], made.device_bill["sparsity"]) == (0, 0, 0)


def test_caches_of_neurons_come_before_resident_layers() -> None:
    made = plan_cached(24 * GIB, 200 * GIB, 2000)
    left = 24 * GIB - FIXED - 2 * LAYER
    cache = 2000 * CACHED + FLAGS
    num_resident = (left - 80 * cache) // (LAYER - cache)
    assert (made.num_cached_neurons, made.num_slots) == (2000, 2)
    assert len(made.resident_layers) == num_resident < 11
    assert made.device_bill["neuron_cache"] == (80 - num_resident) * cache


def test_caches_are_as_large_as_there_is_room_for_and_none_is_worth_less_than_a_quarter() -> None:
    wanted = NUM_KEPT
    for num_fitting, num_cached in ((wanted, wanted), (wanted // 2, wanted // 2), (wanted // 4 - 1, 0)):
        fitting = FIXED + 2 * LAYER + 80 * (num_fitting * CACHED + FLAGS)
        made = plan_cached(fitting, 200 * GIB)
        assert made.num_cached_neurons == num_cached
        assert bool(made.resident_layers) == (num_cached == 0)
        less = plan_cached(fitting - 1, 200 * GIB)
        assert less.num_cached_neurons == max(0, num_cached - 1)
        assert less.device_nbytes <= fitting - 1


def test_layers_on_disk_have_no_caches_and_residents_have_their_room() -> None:
    made, plain = plan_cached(24 * GIB, 64 * GIB, 2000), plan(24 * GIB, 64 * GIB)
    assert made.disk_layers
    assert made == plain


def test_a_resident_model_has_no_caches() -> None:
    made = plan_cached(FIXED + 80 * LAYER, 10 * GIB)
    assert made.resident_layers == tuple(range(80))
    assert (made.num_cached_neurons, made.device_bill["neuron_cache"]) == (0, 0)


@given(
    device_nbytes=st.integers(FIXED + 2 * LAYER + SPARSITY, FIXED + 90 * LAYER),
    host_nbytes=st.one_of(st.integers(2 * READER, 8 * GIB), st.integers(8 * GIB, 200 * GIB)),
    staged=st.booleans(),
    num_cached=st.integers(0, 28672),
)
def test_plans_of_sparse_steps_stay_within_their_budgets_and_their_bills_add_up(
    device_nbytes: int, host_nbytes: int, staged: bool, num_cached: int
) -> None:
    host_nbytes += 32 * MIB + 2 * LAYER if staged else 0
    for made in (
        plan_kept(device_nbytes, host_nbytes, staged=staged),
        plan_cached(device_nbytes, host_nbytes, num_cached, staged=staged),
    ):
        assert made.device_nbytes == sum(made.device_bill.values()) <= device_nbytes
        assert made.host_nbytes == sum(made.host_bill.values()) <= host_nbytes
        assert all(nbytes >= 0 for nbytes in (*made.device_bill.values(), *made.host_bill.values()))
        assert sorted(made.resident_layers + made.host_layers + made.disk_layers) == list(range(80))
        assert made.num_slots >= 2 or not made.streamed_layers
        assert made.num_slots <= len(made.streamed_layers)
        assert set(made.kept_layers) <= set(made.streamed_layers)
        assert made.host_bill["layers"] == len(made.host_layers) * LAYER
        assert made.host_bill["kept_neurons"] == len(made.kept_layers) * KEPT
        assert made.device_bill["resident_layers"] + made.device_bill["slots"] == (
            (len(made.resident_layers) + made.num_slots) * LAYER
        )
        cache = made.num_cached_neurons * CACHED + FLAGS if made.num_cached_neurons else 0
        assert made.device_bill["neuron_cache"] == len(made.streamed_layers) * cache
        assert made.num_cached_neurons <= num_cached
        assert not (made.num_cached_neurons and made.disk_layers)
        if set(made.kept_layers) & set(made.host_layers):
            assert set(made.disk_layers) <= set(made.kept_layers), "those on disk come first"
