"""Times expected of a plan, by hand-computed arithmetic; the numbers of llama-3-70b are those of the method's description."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.rates import Rates, rates_from
from offload_sirius.units import GIB, MIB
from offload_sirius.weights.layout import LayerLayout, layer_layout
from offload_sirius.weights.plan import Budgets, Demand, Plan, make_plan
from offload_sirius.weights.predict import Setting, Work, drags, load_seconds, pass_bill, predict
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


def plan(device_nbytes: int, host_nbytes: int, layout: LayerLayout = LAYOUT, *, staged: bool = True) -> Plan:
    demand = Demand(
        kv_cache_nbytes=1280 * MIB,
        position_tables_nbytes=MIB,
        activation_nbytes=200 * MIB,
        reader_nbytes=8 * MIB,
        embedding_on_device=False,
        staged=staged,
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
def test_no_pass_is_faster_than_what_it_is_bound_by_nor_slower_than_all_of_it_in_turn(
    device_gib: int, host_gib: int, link: float, disk: float, memory: float, own_memory: bool
) -> None:
    rates = with_rates(link_bytes_per_second=link, disk_bytes_per_second=disk, device_bytes_per_second=memory)
    given = setting(plan(device_gib * GIB, host_gib * GIB, staged=own_memory), rates, own_memory=own_memory)
    expected, bill = predict(given, TOKEN, PROMPT), pass_bill(given, TOKEN, decoding=True)
    in_turn = bill.link_seconds + bill.disk_seconds + bill.compute_seconds
    assert bill.bound_seconds * (1 - 1e-9) <= expected.seconds_per_pass <= in_turn * (1 + 1e-9)
    assert math.isfinite(expected.first_token_seconds)
