"""Times expected of a plan, by hand-computed arithmetic; the numbers of llama-3-70b are those of the method's description."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from offload_sirius.quantization import Kind, WeightFormat
from offload_sirius.rates import QuantizedRates, Rates, rates_from
from offload_sirius.units import GIB, MIB
from offload_sirius.weights.copy_plan import make_copy_plan
from offload_sirius.weights.hot_plan import make_hot_plan
from offload_sirius.weights.layout import LayerLayout, layer_layout
from offload_sirius.weights.plan import Budgets, Demand, Plan, ReadingCost, make_plan
from offload_sirius.weights.predict import (
    COUNTED_PASSES,
    Setting,
    Work,
    bound_of,
    drags,
    load_seconds,
    pass_bill,
    pass_nbytes,
    predict,
    predict_correction,
    predict_draft,
)
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:llama-3-70b").spec
LAYOUT = layer_layout(SPEC, 2)
ATTENTION, FEED_FORWARD, NORMS = 150_994_944, 704_643_072, 16_384
LAYER_PARAMETERS = ATTENTION + FEED_FORWARD + NORMS
LAYER = 2 * LAYER_PARAMETERS
HEAD_PARAMETERS = 1_050_673_152
HEAD = 2 * HEAD_PARAMETERS

LINK, DISK, MEMORY, FLOPS = 25e9, 3e9, 1008e9, 165e12
LAYER_OVERHEAD, STEP_OVERHEAD = 1e-4, 1e-3
RATES = rates_from(
    "given",
    link_bytes_per_second=LINK,
    disk_bytes_per_second=DISK,
    device_bytes_per_second=MEMORY,
    device_flops_per_second=FLOPS,
    layer_overhead_seconds=LAYER_OVERHEAD,
    step_overhead_seconds=STEP_OVERHEAD,
    compute_share_beside_copies=1.0,
    copy_share_beside_computing=1.0,
    compute_share_beside_readers=1.0,
)
TOKEN = Work(num_rows=1, num_chunks=1, num_head_rows=1, mixing_nbytes=2 * 2 * 8 * 128 * 2304, mixing_flops=4 * 64 * 128 * 2304)
PROMPT = Work(num_rows=1024, num_chunks=2, num_head_rows=1, mixing_nbytes=4 * 1024 * 1024, mixing_flops=4 * 8192 * 786_432)


def plan(
    device_nbytes: int, host_nbytes: int, layout: LayerLayout = LAYOUT, *, staged: bool = True, num_cached_neurons: int = 0
) -> Plan:
    demand = Demand(
        kv_cache_nbytes=1280 * MIB,
        position_tables_nbytes=MIB,
        activation_nbytes=200 * MIB,
        reading=ReadingCost(reader_nbytes=8 * MIB, placer_nbytes=0, num_cores=1),
        embedding_on_device=False,
        staged=staged,
        num_cached_neurons=num_cached_neurons,
    )
    return make_plan(SPEC, layout, demand, Budgets(device_nbytes=device_nbytes, host_nbytes=host_nbytes))


def setting(made: Plan, rates: Rates = RATES, **changes: Any) -> Setting:
    usual: dict[str, Any] = {
        "plan": made,
        "layout": LAYOUT,
        "stored_nbytes": {part: LAYOUT.part_nbytes(part) for part in ("attention", "records")},
        "load_nbytes": 80 * 10**9,
        "own_memory": True,
        "paced_bytes_per_second": None,
        "rates": rates,
    }
    return Setting(**usual | changes)


def with_rates(**changes: float) -> Rates:
    return replace(RATES, **changes)  # type: ignore[arg-type]


def test_a_pass_bound_by_the_link_takes_exactly_its_bytes_over_its_rate() -> None:
    made = plan(24 * GIB, 200 * GIB)
    num_streamed = len(made.streamed_layers)
    assert 60 < num_streamed < 80
    expected = predict(setting(made), TOKEN, PROMPT)
    assert expected.seconds_per_token == pytest.approx(num_streamed * LAYER / LINK, rel=1e-12)
    assert expected.bound == "link"


def test_a_pass_of_residents_takes_what_computing_them_takes() -> None:
    made = plan(200 * GIB, 10 * GIB)
    assert not made.streamed_layers
    layer = LAYER / MEMORY + TOKEN.mixing_nbytes / MEMORY + LAYER_OVERHEAD
    expected = predict(setting(made), TOKEN, PROMPT)
    assert expected.seconds_per_token == pytest.approx(80 * layer + HEAD / MEMORY + STEP_OVERHEAD, rel=1e-12)
    assert expected.bound == "compute"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_layers_are_read_at_their_own_rate_and_each_further_token_adds_its_arithmetic(kind: Kind) -> None:
    layout = layer_layout(SPEC, 2, 0, WeightFormat(kind=kind))
    quantized = QuantizedRates(bytes_per_second=5e11, flops_per_second=9e13, unpacking_bytes_per_second=4e10, source="given")
    made, rates = plan(300 * GIB, 10 * GIB, layout), replace(RATES, quantized={kind: quantized})
    weights = layout.nbytes / layout.nbytes_per_weight

    def layer_seconds(num_rows: int, num_chunks: int = 1) -> float:
        work = replace(TOKEN, num_rows=num_rows, num_chunks=num_chunks)
        return predict(setting(made, rates, layout=layout), work, PROMPT).token.weights_seconds / 80

    assert layer_seconds(1) == pytest.approx(layout.nbytes / 5e11)
    assert layer_seconds(16) == pytest.approx(layout.nbytes / 5e11 + 15 * 2 * weights / 9e13)
    assert layer_seconds(1024, 2) == pytest.approx(2 * layout.nbytes / 4e10 + 1024 * 2 * weights / FLOPS)
    assumed = predict(setting(made, layout=layout), TOKEN, PROMPT)
    assert assumed.token.weights_seconds == pytest.approx(80 * layout.nbytes / RATES.of_quantized(kind).bytes_per_second)
    assert assumed.sources[f"{kind}_weights"] == "assumed"
    assert assumed.token.head_seconds == pytest.approx(HEAD / MEMORY)
    of_head = predict(setting(made, rates, layout=layout, head_format=layout.format), TOKEN, PROMPT)
    assert of_head.token.head_seconds == pytest.approx(HEAD / 5e11), "the bill says how many bytes the head has"


def test_the_bill_of_a_token_is_bytes_over_rates() -> None:
    made = plan(24 * GIB, 64 * GIB)
    bill = pass_bill(setting(made), TOKEN, decoding=True)
    assert (bill.link_nbytes, bill.link_seconds) == (made.pass_nbytes, made.pass_nbytes / LINK)
    num_disk = len(made.disk_layers)
    assert num_disk > 0
    assert (bill.disk_nbytes, bill.disk_seconds) == (num_disk * LAYER, num_disk * LAYER / DISK)
    assert bill.weights_seconds == pytest.approx(80 * LAYER / MEMORY)
    assert bill.mixing_seconds == pytest.approx(80 * 2 * 2 * 8 * 128 * 2304 / MEMORY)
    assert bill.overhead_seconds == pytest.approx(80 * LAYER_OVERHEAD + STEP_OVERHEAD)
    assert bill.head_seconds == pytest.approx(HEAD / MEMORY)
    assert bill.drag_seconds == 0
    assert bill.bound == "disk"


def test_the_bill_of_a_prompt_is_its_arithmetic() -> None:
    bill = pass_bill(setting(plan(24 * GIB, 200 * GIB)), PROMPT, decoding=False)
    assert bill.weights_seconds == pytest.approx(80 * 2 * 1024 * LAYER_PARAMETERS / FLOPS)
    assert bill.mixing_seconds == pytest.approx(80 * 4 * 8192 * 786_432 / FLOPS)
    assert bill.overhead_seconds == pytest.approx(2 * 80 * LAYER_OVERHEAD + STEP_OVERHEAD)
    assert bill.head_seconds == pytest.approx(HEAD / MEMORY)


def test_the_first_token_waits_for_the_first_layer_and_hides_computing_behind_the_rest() -> None:
    made = plan(24 * GIB, 200 * GIB)
    first = predict(setting(made), TOKEN, PROMPT).first_token_seconds
    link = len(made.streamed_layers) * LAYER / LINK
    computing = pass_bill(setting(made), PROMPT, decoding=False).compute_seconds
    assert link < first < link + computing


def test_a_pass_bound_by_the_disk_alone_takes_exactly_its_bytes_over_its_rate() -> None:
    made = plan(24 * GIB, 6 * GIB)
    assert not made.host_layers
    expected = predict(setting(made), TOKEN, PROMPT)
    assert expected.seconds_per_token == pytest.approx(len(made.disk_layers) * LAYER / DISK, rel=1e-12)
    assert expected.bound == "disk"


def test_with_host_layers_in_one_of_two_slots_the_disk_waits_while_its_layer_is_uploaded() -> None:
    made = plan(24 * GIB, 64 * GIB)
    assert (made.num_slots, made.host_layers[:3], made.disk_layers[:3]) == (2, (1, 2, 4), (3, 5, 7))
    expected = predict(setting(made), TOKEN, PROMPT)
    disk, upload = len(made.disk_layers) * LAYER / DISK, len(made.disk_layers) * LAYER / LINK
    assert disk + 0.5 * upload < expected.seconds_per_token < disk + 1.1 * upload


def test_an_emulated_link_carries_disk_layers_at_its_own_rate_beside_the_disk() -> None:
    made = plan(24 * GIB, 3 * GIB, staged=False)
    assert not made.host_layers
    streamed = len(made.streamed_layers) * LAYER
    slow = predict(setting(made, own_memory=False, paced_bytes_per_second=1e9), TOKEN, PROMPT)
    assert slow.seconds_per_token == pytest.approx(streamed / 1e9, rel=1e-12)
    fast = predict(setting(made, own_memory=False, paced_bytes_per_second=100e9), TOKEN, PROMPT)
    assert fast.seconds_per_token == pytest.approx(streamed / DISK, rel=1e-12)


def test_computing_and_copying_run_together_until_the_first_of_them_ends() -> None:
    rates = with_rates(compute_share_beside_copies=0.5, copy_share_beside_computing=0.8)
    # 4 s of copies take 5 s beside computing, which does 2.5 of its 10 s meanwhile: 12.5 s in all.
    assert drags(10.0, 4.0, rates) == pytest.approx((2.5, 1.0))
    # 1 s of computing takes 2 s beside the copies, which do 1.6 of their 4 s meanwhile: 4.4 s in all.
    assert drags(1.0, 4.0, rates) == pytest.approx((1.0, 0.4))


def test_copies_that_take_cores_from_computing_prolong_a_pass_bound_by_it() -> None:
    rates = with_rates(device_bytes_per_second=10e9, compute_share_beside_copies=0.5, copy_share_beside_computing=0.8)
    made = plan(100 * GIB, 200 * GIB, staged=False)
    given = setting(made, rates, own_memory=False)
    bill = pass_bill(given, TOKEN, decoding=True)
    assert bill.drag_seconds == pytest.approx(len(made.host_layers) * LAYER / LINK / 0.8 * 0.5)
    assert predict(given, TOKEN, PROMPT).seconds_per_token == pytest.approx(bill.compute_seconds, rel=1e-9)


def test_readers_that_have_a_core_to_themselves_slow_computing_but_not_the_prompt() -> None:
    given = setting(plan(24 * GIB, 64 * GIB), with_rates(compute_share_beside_readers=0.5))
    assert pass_bill(given, TOKEN, decoding=True).weights_seconds == pytest.approx(2 * 80 * LAYER / MEMORY)
    assert pass_bill(given, PROMPT, decoding=False).weights_seconds == pytest.approx(80 * 2 * 1024 * LAYER_PARAMETERS / FLOPS)


def test_loading_takes_the_longer_of_reading_and_uploading() -> None:
    made = plan(24 * GIB, 64 * GIB)
    uploaded = HEAD + 2 * 8192 + len(made.resident_layers) * LAYER
    assert load_seconds(setting(made)) == pytest.approx(80e9 / DISK)
    assert load_seconds(setting(made, with_rates(disk_bytes_per_second=1e12))) == pytest.approx(uploaded / LINK)
    assert load_seconds(setting(made, with_rates(disk_bytes_per_second=1e12), own_memory=False)) == pytest.approx(0.08)
    assert load_seconds(setting(made, load_nbytes=None)) is None


def test_sequences_decoded_together_share_the_bytes_of_a_pass() -> None:
    made = plan(24 * GIB, 200 * GIB)
    expected = predict(setting(made), replace(TOKEN, num_rows=4, num_head_rows=4), PROMPT)
    assert expected.seconds_per_pass == pytest.approx(made.pass_nbytes / LINK, rel=1e-12)
    assert expected.seconds_per_token == pytest.approx(made.pass_nbytes / LINK / 4, rel=1e-12)


@given(
    device_gib=st.integers(10, 150),
    host_gib=st.integers(8, 150),
    link=st.floats(1e9, 100e9),
    disk=st.floats(1e8, 20e9),
    memory=st.floats(1e9, 2e12),
    own_memory=st.booleans(),
)
@example(device_gib=125, host_gib=12, link=69670447102.0, disk=1e8, memory=1028150885935.0, own_memory=False)
def test_no_pass_is_faster_than_what_it_is_bound_by_nor_slower_than_all_of_it_in_turn(
    device_gib: int, host_gib: int, link: float, disk: float, memory: float, own_memory: bool
) -> None:
    rates = with_rates(link_bytes_per_second=link, disk_bytes_per_second=disk, device_bytes_per_second=memory)
    given = setting(plan(device_gib * GIB, host_gib * GIB, staged=own_memory), rates, own_memory=own_memory)
    expected, bill = predict(given, TOKEN, PROMPT), pass_bill(given, TOKEN, decoding=True)
    in_turn = bill.link_seconds + bill.disk_seconds + bill.compute_seconds
    # Where computing takes nearly as long as copies, slots that were full before the passes that count are empty behind them.
    ahead = given.plan.num_slots * given.plan.layer_nbytes / link / COUNTED_PASSES
    assert (bill.bound_seconds - ahead) * (1 - 1e-9) <= expected.seconds_per_pass <= in_turn * (1 + 1e-9)
    assert math.isfinite(expected.first_token_seconds)


# Drafts and corrections. Half of the neurons: N = 14336 of 28672.

NUM_KEPT = 14336
GATE, RECORD = 2 * 28672 * 8192, 2 * 2 * 8192
KEPT_LAYER = 2 * (ATTENTION + NORMS + FEED_FORWARD // 2)
KEEPING = layer_layout(SPEC, 2, NUM_KEPT)
KEPT = replace(TOKEN, cargo="kept")
GATED = replace(TOKEN, cargo="gate", num_fetched=NUM_KEPT)
CORRECTION = replace(TOKEN, num_rows=16, num_head_rows=16)
IDLE = {"device_bytes_per_second": 1e30, "device_flops_per_second": 1e30, "layer_overhead_seconds": 1e-30}


def keeping(device_gib: int = 24, host_gib: int = 260, **changes: Any) -> Setting:
    return setting(plan(device_gib * GIB, host_gib * GIB, KEEPING), layout=KEEPING, **changes)


def test_a_coarse_draft_of_llama_3_70b_brings_588_thousandths_of_a_pass() -> None:
    given = keeping()
    num_streamed = len(given.plan.streamed_layers)
    assert given.plan.kept_layers == given.plan.streamed_layers
    draft, full = predict_draft(given, KEPT), predict(given, TOKEN, PROMPT)
    assert draft.nbytes == num_streamed * KEPT_LAYER
    assert draft.nbytes / given.plan.pass_nbytes == pytest.approx(0.588, abs=5e-4)
    assert draft.seconds == pytest.approx(draft.nbytes / LINK, rel=1e-12)
    assert full.seconds_per_pass / draft.seconds == pytest.approx(1.70, abs=5e-3)
    assert draft.bill.bound == "link"


def test_a_fine_draft_brings_all_gates_and_what_it_sends_for() -> None:
    given = setting(plan(24 * GIB, 260 * GIB), with_rates(**IDLE))
    draft = predict_draft(given, GATED)
    layer = 2 * (ATTENTION + NORMS) + GATE + NUM_KEPT * RECORD
    assert draft.nbytes == len(given.plan.streamed_layers) * layer
    assert layer / LAYER == pytest.approx(0.7255, abs=5e-5)
    # Nobody computes for long, so that nothing but the link counts.
    behind = HEAD / 1e30 + STEP_OVERHEAD
    assert draft.nbytes / LINK <= draft.seconds * (1 + 1e-9) <= draft.nbytes / LINK + behind


def test_records_are_sent_for_when_the_gates_are_known_and_queue_behind_the_next_layer() -> None:
    given = setting(plan(24 * GIB, 260 * GIB), with_rates(**IDLE | {"layer_overhead_seconds": 0.01}))
    assert given.plan.num_slots == 2
    num_streamed, num_resident = len(given.plan.streamed_layers), len(given.plan.resident_layers)
    draft = predict_draft(given, GATED)
    # A layer's overhead passes while the records of its gates arrive, or those of the next; that of residents beside any of them.
    assert draft.nbytes / LINK - 1e-9 <= draft.seconds
    assert draft.seconds <= draft.nbytes / LINK + 0.01 * (num_streamed + num_resident) + STEP_OVERHEAD + 1e-9


def test_what_is_in_a_cache_is_computed_on_and_not_brought() -> None:
    made = plan(60 * GIB, 260 * GIB, num_cached_neurons=NUM_KEPT)
    assert made.num_cached_neurons == NUM_KEPT
    given, work = setting(made), replace(GATED, num_fetched=4096)
    num_streamed, num_resident = len(made.streamed_layers), len(made.resident_layers)
    attention = 2 * (ATTENTION + NORMS)
    assert pass_nbytes(given, work) == num_streamed * (attention + GATE + 4096 * RECORD)
    computed = attention + GATE + (NUM_KEPT + 4096) * RECORD
    assert pass_bill(given, work, decoding=True).weights_nbytes == num_resident * LAYER + num_streamed * computed


def test_resident_layers_compute_all_neurons_in_a_draft_too() -> None:
    given = keeping()
    bill = pass_bill(given, KEPT, decoding=True)
    nbytes = len(given.plan.resident_layers) * LAYER + len(given.plan.streamed_layers) * KEPT_LAYER
    assert bill.weights_nbytes == nbytes
    assert bill.weights_seconds == pytest.approx(nbytes / MEMORY)


def test_of_layers_on_disk_whose_kept_neurons_are_in_host_memory_a_draft_reads_the_attention_blocks() -> None:
    given = keeping(host_gib=64)
    disk_layers = given.plan.disk_layers
    assert disk_layers
    assert set(disk_layers) <= set(given.plan.kept_layers)
    bill = pass_bill(given, KEPT, decoding=True)
    assert bill.disk_nbytes == len(disk_layers) * 2 * (ATTENTION + NORMS)
    assert bill.link_nbytes == len(given.plan.streamed_layers) * KEPT_LAYER
    on_cpu = replace(given, own_memory=False)
    host = len(given.plan.host_layers) * KEPT_LAYER
    assert pass_bill(on_cpu, KEPT, decoding=True).copy_nbytes == host + len(disk_layers) * FEED_FORWARD


def test_layers_on_disk_come_whole_where_their_kept_neurons_have_no_room() -> None:
    given = keeping(host_gib=4)
    assert not given.plan.sliceable_layers
    assert predict_draft(given, KEPT).nbytes == given.plan.pass_nbytes
    assert pass_bill(given, KEPT, decoding=True) == pass_bill(given, TOKEN, decoding=True)


def test_fine_drafts_read_layers_on_disk_whole() -> None:
    given = setting(plan(24 * GIB, 64 * GIB))
    num_disk, num_host = len(given.plan.disk_layers), len(given.plan.host_layers)
    layer = 2 * (ATTENTION + NORMS) + GATE + NUM_KEPT * RECORD
    assert pass_nbytes(given, GATED) == num_disk * LAYER + num_host * layer
    assert pass_bill(given, GATED, decoding=True).disk_nbytes == num_disk * LAYER


@pytest.mark.parametrize("host_gib", [64, 160, 260])
def test_a_correction_bound_by_the_link_adds_the_bytes_of_a_full_pass_to_its_window(host_gib: int) -> None:
    given = keeping(host_gib=host_gib, rates=with_rates(disk_bytes_per_second=1e15))
    draft = predict_draft(given, KEPT)
    correction = predict_correction(given, CORRECTION, KEPT, draft.seconds)
    assert correction.nbytes == given.plan.pass_nbytes
    assert correction.seconds == pytest.approx(correction.nbytes / LINK, rel=1e-9)


def test_a_correction_of_many_tokens_takes_their_arithmetic() -> None:
    given = setting(plan(200 * GIB, 10 * GIB))
    rates = with_rates(device_flops_per_second=1e12)
    draft = predict_draft(replace(given, rates=rates), KEPT)
    correction = predict_correction(replace(given, rates=rates), CORRECTION, KEPT, draft.seconds)
    arithmetic = 2 * 16 * (80 * LAYER_PARAMETERS + HEAD_PARAMETERS) / 1e12
    beside = 80 * (TOKEN.mixing_flops / 1e12 + LAYER_OVERHEAD) + STEP_OVERHEAD
    assert correction.seconds == pytest.approx(arithmetic + beside, rel=1e-9)
    assert correction.nbytes == draft.nbytes == 0


def test_a_draft_that_keeps_all_neurons_is_a_pass() -> None:
    given = keeping(host_gib=64)
    full = predict(given, TOKEN, PROMPT)
    assert predict_draft(given, TOKEN).seconds == pytest.approx(full.seconds_per_pass, rel=1e-6)
    assert predict_draft(given, TOKEN).bill == full.token


def test_what_a_window_is_bound_by_is_summed_over_its_passes() -> None:
    fast_link = keeping(rates=with_rates(link_bytes_per_second=1e15))
    compute = pass_bill(fast_link, KEPT, decoding=True)
    link = pass_bill(keeping(), CORRECTION, decoding=True)
    assert (compute.bound, link.bound) == ("compute", "link")
    assert bound_of((1, compute), (1, link)) == "link"
    assert bound_of((10**6, compute), (1, link)) == "compute"


@given(
    device_gib=st.integers(10, 150),
    host_gib=st.integers(8, 250),
    link=st.floats(1e9, 100e9),
    disk=st.floats(1e8, 20e9),
    memory=st.floats(1e9, 2e12),
    own_memory=st.booleans(),
    pace=st.one_of(st.none(), st.floats(1e9, 100e9)),
    cargo=st.sampled_from(["records", "kept", "gate"]),
    num_cached=st.sampled_from([0, NUM_KEPT]),
)
def test_no_draft_and_no_window_is_faster_than_what_it_is_bound_by_nor_slower_than_all_of_it_in_turn(
    device_gib: int,
    host_gib: int,
    link: float,
    disk: float,
    memory: float,
    own_memory: bool,
    pace: float | None,
    cargo: Any,
    num_cached: int,
) -> None:
    rates = with_rates(link_bytes_per_second=link, disk_bytes_per_second=disk, device_bytes_per_second=memory)
    layout = KEEPING if cargo == "kept" else LAYOUT
    num_cached = num_cached if cargo == "gate" else 0
    made = plan(device_gib * GIB, host_gib * GIB, layout, staged=own_memory, num_cached_neurons=num_cached)
    given = setting(made, rates, own_memory=own_memory, layout=layout, paced_bytes_per_second=pace)
    work = replace(TOKEN, cargo=cargo, num_fetched=NUM_KEPT if cargo == "gate" else 0)
    draft = predict_draft(given, work)
    correction = predict_correction(given, CORRECTION, work, draft.seconds)

    def in_turn(*bills: Any) -> float:
        return sum(bill.pacing_seconds + bill.copy_seconds + bill.copy_drag_seconds + bill.disk_seconds + bill.compute_seconds
                   for bill in bills)  # fmt: skip

    assert draft.bill.bound_seconds * (1 - 1e-9) <= draft.seconds <= in_turn(draft.bill) * (1 + 1e-9)
    window, bills = 4 * draft.seconds + correction.seconds, [draft.bill] * 4 + [correction.bill]
    least = max(sum(bill.seconds[kind] for bill in bills) for kind in draft.bill.seconds)
    # What copies and computing take from each other is an estimate in the bills: a replay may find a little less of it.
    assert least * 0.99 <= window <= in_turn(*bills) * (1 + 1e-9)
    assert draft.nbytes <= correction.nbytes == made.pass_nbytes


# Layers that are partly resident: in each of them half of the neurons are, or fewer.

HOT = replace(TOKEN, cargo="hot")
COLD = replace(TOKEN, cargo="cold")
COLD_CORRECTION = replace(CORRECTION, cargo="cold")


def hot(device_gib: float, rates: Rates = RATES, *, own_memory: bool = True, **changes: Any) -> Setting:
    demand = Demand(
        kv_cache_nbytes=1280 * MIB,
        position_tables_nbytes=MIB,
        activation_nbytes=200 * MIB,
        reading=ReadingCost(reader_nbytes=8 * MIB, placer_nbytes=0, num_cores=1),
        embedding_on_device=False,
        staged=own_memory,
        num_hot=NUM_KEPT,
    )
    budgets = Budgets(device_nbytes=int(device_gib * GIB), host_nbytes=160 * GIB)
    return setting(make_hot_plan(SPEC, LAYOUT, demand, budgets), rates, own_memory=own_memory, **changes)


def num_hot_layers(given: Setting) -> int:
    assert given.plan.hot is not None
    return len(given.plan.hot.layers)


@pytest.mark.parametrize("device_gib", [9, 16, 24, 32])
def test_where_part_of_the_layers_is_hot_a_draft_brings_attention_and_kept_neurons_of_the_others(device_gib: int) -> None:
    given = hot(device_gib)
    assert 2 <= num_hot_layers(given) < 40
    draft = predict_draft(given, HOT)
    assert draft.nbytes == (80 - num_hot_layers(given)) * KEPT_LAYER
    assert draft.seconds == pytest.approx(draft.nbytes / LINK, rel=1e-12)
    assert draft.bill.weights_nbytes == 80 * KEPT_LAYER
    correction = predict_correction(given, COLD_CORRECTION, HOT, draft.seconds)
    assert correction.nbytes == given.plan.pass_nbytes == 80 * LAYER - num_hot_layers(given) * KEPT_LAYER
    assert correction.seconds == pytest.approx(correction.nbytes / LINK, rel=1e-9)
    assert correction.bill.weights_nbytes == 80 * LAYER
    full = predict(given, COLD, PROMPT)
    assert full.seconds_per_pass == pytest.approx(correction.nbytes / LINK, rel=1e-9)


def test_a_prompt_brings_all_neurons_of_hot_layers_and_the_others_as_a_whole() -> None:
    given = hot(24)
    assert pass_nbytes(given, PROMPT) == 80 * LAYER - num_hot_layers(given) * 2 * (ATTENTION + NORMS)


def test_where_all_layers_are_hot_a_draft_brings_nothing_and_the_link_works_for_the_correction() -> None:
    given = hot(100)
    assert num_hot_layers(given) == 80
    draft = predict_draft(given, HOT)
    assert (draft.nbytes, draft.bill.bound) == (0, "compute")
    assert draft.seconds == pytest.approx(draft.bill.compute_seconds)
    correction = predict_correction(given, COLD_CORRECTION, HOT, draft.seconds)
    assert correction.nbytes == given.plan.pass_nbytes == 80 * FEED_FORWARD
    assert correction.seconds + 4 * draft.seconds == pytest.approx(correction.nbytes / LINK), "and never idles"


def test_without_overlap_a_correction_takes_all_of_its_bytes_time_behind_the_drafts() -> None:
    given = hot(100, overlap=False)
    draft = predict_draft(given, HOT)
    correction = predict_correction(given, COLD_CORRECTION, HOT, draft.seconds)
    assert correction.nbytes / LINK <= correction.seconds <= 1.05 * correction.nbytes / LINK


def test_a_byte_of_a_hot_layer_saves_more_of_a_draft_than_one_of_a_resident_layer() -> None:
    whole, partly = keeping(24, 160), hot(24)
    kept, in_part = predict_draft(whole, KEPT), predict_draft(partly, HOT)
    saved = 80 * KEPT_LAYER - kept.nbytes, 80 * KEPT_LAYER - in_part.nbytes
    resident = whole.plan.device_bill["resident_layers"], num_hot_layers(partly) * KEPT_LAYER
    assert saved[0] / resident[0] == pytest.approx(0.588, abs=5e-4)
    assert saved[1] == resident[1]
    assert in_part.seconds < kept.seconds


@settings(deadline=None)
@given(
    device_gib=st.integers(9, 150),
    link=st.floats(1e9, 100e9),
    memory=st.floats(1e9, 2e12),
    own_memory=st.booleans(),
    pace=st.one_of(st.none(), st.floats(1e9, 100e9)),
)
def test_no_window_with_hot_layers_is_faster_than_what_it_is_bound_by_nor_slower_than_all_of_it_in_turn(
    device_gib: int, link: float, memory: float, own_memory: bool, pace: float | None
) -> None:
    rates = with_rates(link_bytes_per_second=link, device_bytes_per_second=memory)
    given = hot(device_gib, rates, own_memory=own_memory, paced_bytes_per_second=pace)
    draft = predict_draft(given, HOT)
    correction = predict_correction(given, COLD_CORRECTION, HOT, draft.seconds)
    window, bills = 4 * draft.seconds + correction.seconds, [draft.bill] * 4 + [correction.bill]
    least = max(sum(bill.seconds[kind] for bill in bills) for kind in draft.bill.seconds)
    in_turn = sum(bill.pacing_seconds + bill.copy_seconds + bill.copy_drag_seconds + bill.compute_seconds for bill in bills)
    assert least * (1 - 1e-9) <= window <= in_turn * (1 + 1e-9)
    assert correction.nbytes == given.plan.pass_nbytes


# Drafts that compute on a copy in 4 bits.


def copied(device_gib: float, **changes: Any) -> Setting:
    demand = Demand(
        kv_cache_nbytes=1280 * MIB,
        position_tables_nbytes=MIB,
        activation_nbytes=200 * MIB,
        reading=ReadingCost(reader_nbytes=8 * MIB, placer_nbytes=0, num_cores=1),
        embedding_on_device=False,
        staged=True,
        num_hot=SPEC.ffn_width,
        draft_format=WeightFormat(kind="int4", group=32),
    )
    budgets = Budgets(device_nbytes=int(device_gib * GIB), host_nbytes=160 * GIB)
    return setting(make_copy_plan(SPEC, LAYOUT, demand, budgets), **changes)


@pytest.mark.parametrize("device_gib", [24, 48, 60])
def test_a_draft_on_a_copy_takes_its_bytes_at_their_own_rate_and_a_correction_those_of_all_layers(device_gib: int) -> None:
    given = copied(device_gib)
    draft = predict_draft(given, HOT)
    copy_nbytes = given.plan.device_bill["attention"] + given.plan.device_bill["hot_neurons"]
    assert (draft.nbytes, draft.bill.bound, draft.bill.weights_nbytes) == (0, "compute", copy_nbytes)
    assert draft.bill.weights_seconds == pytest.approx(copy_nbytes / RATES.of_quantized("int4").bytes_per_second)
    assert draft.seconds == pytest.approx(draft.bill.compute_seconds)
    correction = predict_correction(given, CORRECTION, HOT, draft.seconds)
    assert correction.nbytes == given.plan.pass_nbytes == correction.bill.weights_nbytes == 80 * LAYER
    assert correction.bill.weights_seconds == pytest.approx(80 * LAYER / MEMORY)
    assert predict(given, TOKEN, PROMPT).seconds_per_pass == pytest.approx(80 * LAYER / LINK, rel=1e-9)
    slots_nbytes = given.plan.num_slots * LAYER
    if slots_nbytes / LINK < 4 * draft.seconds:
        assert correction.seconds == pytest.approx((80 * LAYER - slots_nbytes) / LINK, rel=0.02), "slots are full by then"
    else:
        assert correction.seconds + 4 * draft.seconds == pytest.approx(80 * LAYER / LINK), "the link never idles"


def test_without_overlap_a_correction_behind_a_copy_takes_all_of_its_bytes_time() -> None:
    given = copied(48, overlap=False)
    draft = predict_draft(given, HOT)
    correction = predict_correction(given, CORRECTION, HOT, draft.seconds)
    assert 80 * LAYER / LINK <= correction.seconds <= 1.05 * 80 * LAYER / LINK
