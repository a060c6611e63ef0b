"""What is chosen among candidates, and that a plan knows its bytes before anything counts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius import machine
from offload_sirius.config import DecodingConfig, EngineConfig, PlanConfig
from offload_sirius.engine import Engine
from offload_sirius.engine.planning import (
    DESCRIBED,
    Candidate,
    Hardware,
    alternatives,
    candidates,
    hardware_asked_for,
    hardware_named,
    plan_model,
    rates_asked_for,
    rates_of,
)
from offload_sirius.errors import BudgetError, ConfigError
from offload_sirius.model.costs import recorded_steps_nbytes
from offload_sirius.rates import NAMES, Stored, assumed_cpu_rates, rates_file, rates_from, write_rates
from offload_sirius.sparsity.costs import num_fetched
from offload_sirius.weights.pieces import load_nbytes
from offload_sirius.weights.predict import bound_of
from offload_sirius_loaders import open_checkpoint

from .conftest import CONTEXT, PLACES, Budgets, Load

SMALL = open_checkpoint("synthetic:small?dtype=F32")
HERE = Hardware(
    device="cpu", model="a CPU, 2 cores", own_memory=False, free_device_nbytes=None, free_host_nbytes=8 << 30, num_cores=2
)


def considered(faster: str, failing: tuple[str, ...] = ()) -> Callable[[EngineConfig], Candidate]:
    """One dtype reads its weights a thousand times as fast as the other; some do not fit."""

    def consider(config: EngineConfig) -> Candidate:
        if config.dtype in failing:
            raise BudgetError(config.dtype)
        planned = plan_model(SMALL, config, HERE)
        rates = rates_of(HERE, planned.dtype, Stored())
        rates = rates.given(device_bytes_per_second=1e10 if planned.dtype == faster else 1e7)
        return Candidate(planned=planned, prediction=planned.predict(rates, 8))

    return consider


STREAMED = DecodingConfig(draft="streamed")
AUTO = EngineConfig(model="synthetic:small?dtype=F32", auto=True, decoding=STREAMED)


@pytest.mark.parametrize("faster", ["bfloat16", "float32"])
def test_auto_takes_the_dtype_that_is_predicted_to_be_faster(faster: str) -> None:
    found = candidates(AUTO, SMALL.spec, considered(faster))
    assert found[0].planned.dtype == faster
    assert len(found) == 2


def test_what_does_not_fit_is_no_candidate_and_nothing_at_all_is_an_error() -> None:
    assert [each.planned.dtype for each in candidates(AUTO, SMALL.spec, considered("float32", ("float32",)))] == ["bfloat16"]
    with pytest.raises(BudgetError, match=r"^float32$"):
        candidates(AUTO, SMALL.spec, considered("float32", ("float32", "bfloat16")))


def test_what_was_asked_for_is_not_chosen_anew() -> None:
    assert [each.dtype for each in alternatives(EngineConfig(decoding=STREAMED), SMALL.spec)] == ["float32"]
    asked = EngineConfig(auto=True, dtype="bfloat16", decoding=STREAMED)
    assert [each.dtype for each in alternatives(asked, SMALL.spec)] == ["bfloat16"]


@pytest.mark.parametrize(
    ("settings", "drafts"),
    [
        ({}, ["streamed", "neurons", "layers"]),
        ({"mode": "sparse"}, ["streamed", "neurons", "layers"]),
        ({"draft_keep": 0.25}, ["streamed", "neurons", "layers"]),
        ({"draft": "resident"}, ["neurons", "layers"]),
        ({"draft": "resident", "resident_first": "layers"}, ["layers"]),
        ({"resident_first": "neurons"}, ["streamed", "neurons"]),
        ({"draft": "streamed"}, ["streamed"]),
        ({"sparsity": "cats"}, ["streamed"]),
        ({"mode": "full"}, ["streamed"]),
        ({"keep": 1}, ["streamed"]),
    ],
    ids=str,
)
def test_where_drafts_live_is_chosen_where_they_keep_neurons_and_nobody_has_said(
    settings: dict[str, Any], drafts: list[str]
) -> None:
    found = alternatives(EngineConfig(decoding=DecodingConfig(**settings)), SMALL.spec)
    assert [_way(each.decoding) for each in found] == drafts
    both = alternatives(EngineConfig(auto=True, decoding=DecodingConfig(**settings)), SMALL.spec)
    assert [(each.dtype, _way(each.decoding)) for each in both] == [
        (dtype, draft) for dtype in ("float32", "bfloat16") for draft in drafts
    ]


def _way(decoding: DecodingConfig) -> str:
    return decoding.resident_first if decoding.draft == "resident" else decoding.draft


@pytest.mark.parametrize(("device_memory", "first"), [("44GiB", "neurons"), ("36GiB", "layers")])
def test_what_comes_first_on_the_device_is_what_is_predicted_to_be_faster(device_memory: str, first: str) -> None:
    """Devices for which some neurons of every layer fit, many of those that are asked for or a few."""
    checkpoint = open_checkpoint("synthetic:llama-3-70b")
    config = EngineConfig(
        model="synthetic:llama-3-70b",
        decoding=DecodingConfig(draft="resident"),
        device_memory=device_memory,
        host_memory="200GiB",
    )

    def consider(config: EngineConfig) -> Candidate:
        planned = plan_model(checkpoint, config, DESCRIBED)
        rates = rates_of(DESCRIBED, planned.dtype, Stored())
        return Candidate(planned=planned, prediction=planned.predict(rates, 512))

    found = candidates(config, checkpoint.spec, consider)
    plans = [each.planned.plan.hot for each in found]
    assert {len(hot.layers) == 80 for hot in plans if hot} == {True, False}
    assert found[0].planned.config.decoding.resident_first == first


def test_measured_rates_are_taken_before_assumed_ones_and_given_ones_before_both() -> None:
    measured = rates_from("measured 2026-11-25", **dict.fromkeys(NAMES, 1.0))
    stored = Stored(rates={HERE.rates_key("bfloat16"): measured})
    assert rates_of(HERE, "bfloat16", stored) == measured
    assert set(rates_of(HERE, "float32", stored).sources.values()) == {"assumed"}
    asked = rates_asked_for(HERE, "bfloat16", stored, EngineConfig(link_gbps=3), PlanConfig(disk_gbps=2))
    assert (asked.disk_bytes_per_second, asked.sources["disk_bytes_per_second"]) == (2e9, "given")
    assert asked.link_bytes_per_second == 1.0, "an emulated link is not the machine's own"
    described = rates_asked_for(DESCRIBED, "bfloat16", stored, EngineConfig(link_gbps=3), PlanConfig(device_tflops=2))
    assert (described.link_bytes_per_second, described.device_flops_per_second) == (3e9, 2e12)


def test_the_cpu_is_planned_for_without_asking_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "offload_sirius.engine.placement", None)  # importing it fails from here on
    monkeypatch.setattr(machine, "free_host_nbytes", lambda: 8 << 30)
    monkeypatch.setattr(machine, "may_have_gpu", lambda: False)
    assert hardware_named("auto") == hardware_named("cpu")
    monkeypatch.setattr(machine, "may_have_gpu", lambda: True)
    with pytest.raises(ImportError):
        hardware_named("auto")


def test_a_device_is_either_described_or_named() -> None:
    asked = PlanConfig(device_gbps=1000)
    assert hardware_asked_for(EngineConfig(), asked, Stored()) == DESCRIBED
    with pytest.raises(
        ConfigError, match="--device is cpu, and --device-tflops or --device-gbps describe another; give one of them"
    ):
        hardware_asked_for(EngineConfig(device="cpu"), asked, Stored())


@pytest.mark.parametrize("where", PLACES)
def test_bytes_of_the_plan_are_those_of_the_counters(where: str, load: Load, budgets: Budgets) -> None:
    engine: Engine = load(**budgets(where))
    result = engine.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True)
    assert result.link.bytes.load == load_nbytes(engine.checkpoint, engine.plan)
    assert result.link.bytes.prefill == engine.plan.pass_nbytes
    assert result.link.bytes.full == 4 * engine.plan.pass_nbytes


@pytest.mark.parametrize(
    ("sparsity", "where"),
    [("griffin", where) for where in (*PLACES, "host + kept", "disk + kept")]
    # With more room there are caches, and what is found in them nobody knows beforehand.
    + [("cats", where) for where in PLACES if where != "one resident, rest on the host"],
)
def test_predicted_bytes_of_drafts_and_corrections_are_those_of_the_counters(
    sparsity: Any, where: str, load: Load, budgets: Budgets
) -> None:
    decoding = DecodingConfig(sparsity=sparsity, keep=0.25, window=5)
    engine = load(mode="sirius", decoding=decoding, **budgets(where, decoding=decoding))
    assert not engine.plan.num_cached_neurons
    result = engine.generate([1, 2, 3], max_new_tokens=16, ignore_eos=True)
    predicted: Any = result.plan["predicted"]
    assert result.passes.draft > result.passes.correction > 1
    assert result.link.bytes.draft == result.passes.draft * predicted["draft"]["nbytes"]
    assert result.link.bytes.correction == result.passes.correction * predicted["correction"]["nbytes"]


def test_an_answer_in_another_mode_carries_what_was_predicted_for_that_one(load: Load, budgets: Budgets) -> None:
    decoding = DecodingConfig(window=4)
    engine = load(mode="sirius", decoding=decoding, link_gbps=0.1, **budgets("host", decoding=decoding))
    by_mode: dict[str, Any] = {
        mode: engine.generate([1, 2, 3], mode=mode, max_new_tokens=2, ignore_eos=True).plan["predicted"]
        for mode in ("full", "sparse", "sirius")
    }
    full, sparse, sirius = by_mode.values()
    assert full["seconds_per_token"] == full["seconds_per_pass"] == pytest.approx(engine.plan.pass_nbytes / 0.1e9)
    assert (full["draft"], full["correction"], full["by_acceptance"]) == (None, None, [])
    assert sparse["seconds_per_token"] == sparse["draft"]["seconds"] == pytest.approx(sparse["draft"]["nbytes"] / 0.1e9)
    assert (sparse["correction"], sparse["by_acceptance"]) == (None, [])
    window = 3 * sirius["draft"]["seconds"] + sirius["correction"]["seconds"]
    assert sirius["seconds_per_token"] == pytest.approx(window / (1 + 0.8 + 0.8**2 + 0.8**3))
    assert {each["seconds_per_pass"] for each in by_mode.values()} == {full["seconds_per_pass"]}


def drafting(**settings: Any) -> EngineConfig:
    return EngineConfig(model="synthetic:small?dtype=F32", max_context=64, decoding=replace(STREAMED, **settings))


def test_a_speed_is_predicted_for_each_acceptance_and_the_most_careful_one_is_assumed() -> None:
    planned = plan_model(SMALL, drafting(mode="sirius"), HERE)
    expected = planned.predict(assumed_cpu_rates(2), 8)
    assert [each.acceptance for each in expected.windows] == [0.8, 0.9, 0.95]
    assert expected.seconds_per_token == expected.windows[0].seconds_per_token
    seconds = [each.seconds_per_token for each in expected.windows]
    assert seconds == sorted(seconds, reverse=True)
    assumed, draft = expected.windows[0], expected.draft
    assert draft is not None
    assert expected.bound == bound_of((assumed.window - 1, draft.bill), (1, assumed.correction.bill))


def test_leaves_of_a_tree_are_drafted_together_and_all_its_nodes_are_corrected() -> None:
    line, tree = (plan_model(SMALL, drafting(window=4, tree_width=width), HERE) for width in (1, 8))
    rates = assumed_cpu_rates(2).given(device_flops_per_second=1e9)
    of_line, of_tree = (planned.predict(rates, 8) for planned in (line, tree))
    assert of_line.draft is not None
    assert of_tree.draft is not None
    assert of_tree.draft.bill.head_seconds == pytest.approx(8 * of_line.draft.bill.head_seconds)
    corrections = [each.windows[0].correction.bill.head_seconds for each in (of_line, of_tree)]
    assert corrections[1] == pytest.approx(corrections[0] / 4 * 25)


def test_drafts_without_sparsity_take_what_a_full_pass_takes() -> None:
    expected = plan_model(SMALL, drafting(mode="sparse", keep=1), HERE).predict(assumed_cpu_rates(2), 8)
    assert expected.seconds_per_token == pytest.approx(expected.seconds_per_pass)


def test_sequences_drafted_together_share_the_passes_of_a_window() -> None:
    one, four = (plan_model(SMALL, replace(drafting(window=4), parallel=parallel), HERE) for parallel in (1, 4))
    rates = assumed_cpu_rates(2).given(device_flops_per_second=1e15)
    of_one, of_four = one.predict(rates, 8), four.predict(rates, 8)
    assert of_four.seconds_per_token == pytest.approx(of_one.seconds_per_token / 4, rel=0.1)
    assert of_one.draft is not None
    assert of_four.draft is not None
    assert of_four.draft.nbytes == of_one.draft.nbytes


@pytest.mark.parametrize(("num_cached", "fetched"), [(0, 50), (50, 50 - 30), (25, 50 - 15), (500, 50 - 30)])
def test_a_cache_is_expected_to_hold_more_of_what_is_needed_the_more_is_kept(num_cached: int, fetched: int) -> None:
    assert num_fetched(50, num_cached, 100) == fetched


def test_auto_weighs_dtypes_by_what_drafts_make_of_them() -> None:
    def consider(config: EngineConfig) -> Candidate:
        planned = plan_model(SMALL, config, HERE)
        rates = assumed_cpu_rates(2).given(device_bytes_per_second=1e10 if planned.dtype == "bfloat16" else 1e7)
        return Candidate(planned=planned, prediction=planned.predict(rates, 8))

    found = candidates(AUTO, SMALL.spec, consider)
    assert [each.planned.dtype for each in found] == ["bfloat16", "float32"]
    assert all(each.prediction.windows for each in found)


CHECKPOINTS = [open_checkpoint(f"synthetic:{name}") for name in ("llama-3-70b", "tinyllama-1.1b", "small?layers=3")]


@given(
    checkpoint=st.sampled_from(CHECKPOINTS),
    kind=st.sampled_from([("griffin", "streamed"), ("griffin", "resident"), ("cats", "streamed")]),
    keep=st.floats(0.01, 1),
    device_share=st.floats(0.05, 1.0),
    host_share=st.floats(0.05, 1.0),
    free_share=st.floats(0.1, 3.0),
)
def test_shares_of_what_is_free_never_ask_for_more_than_there_is(
    checkpoint: Any, kind: tuple[Any, Any], keep: float, device_share: float, host_share: float, free_share: float
) -> None:
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    here = replace(HERE, free_host_nbytes=int(free_share * total) + (256 << 20))
    config = EngineConfig(
        model="synthetic:x",
        max_context=64,
        device_memory=f"{device_share:.4f}",
        host_memory=f"{host_share:.4f}",
        decoding=DecodingConfig(sparsity=kind[0], draft=kind[1], keep=keep),
    )
    try:
        plan = plan_model(checkpoint, config, here).plan
    except BudgetError as error:
        if "is too small" not in str(error):
            raise
        return
    assert plan.device_nbytes + plan.host_nbytes <= (here.free_host_nbytes or 0)
    assert sorted(plan.resident_layers + plan.streamed_layers) == list(range(checkpoint.spec.num_layers))
    assert set(plan.kept_layers) <= set(plan.streamed_layers)


def test_an_answer_carries_what_was_predicted_for_it(load: Load, budgets: Budgets) -> None:
    engine = load(**budgets("host"), link_gbps=0.1)
    plan: Any = engine.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True).plan
    predicted = plan["predicted"]
    assert predicted["bound"] == "link"
    assert predicted["seconds_per_token"] == pytest.approx(engine.plan.pass_nbytes / 0.1e9)
    assert predicted["first_token_seconds"] > 0
    assert predicted["load_seconds"] is None, "synthetic weights are computed"
    assert set(predicted["sources"].values()) == {"assumed"}


def test_auto_is_what_the_engine_does_too(load: Load, cache: Path) -> None:
    from offload_sirius.engine.planning import host_hardware

    slow = rates_from("measured 2026-11-25", **dict.fromkeys(NAMES, 1.0))
    write_rates(rates_file(cache), host_hardware().rates_key("float32"), slow)
    assert load(auto=True).predict(CONTEXT).sources["link_bytes_per_second"] == "assumed"
    assert load(auto=True).generate([1], max_new_tokens=1).plan["dtype"] == "bfloat16"
    assert load().generate([1], max_new_tokens=1).plan["dtype"] == "float32"


def test_a_broken_rates_file_is_told_and_used_no_further(load: Load, cache: Path) -> None:
    cache.mkdir()
    rates_file(cache).write_text("{")
    assert load().rates_problem.startswith(f"{cache}/rates.json: is ignored, it does not hold rates; ")


GPU = replace(HERE, own_memory=True, free_device_nbytes=4 << 30)


@pytest.mark.parametrize(
    ("hardware", "decoding", "billed"),
    [
        (GPU, DecodingConfig(draft="resident"), True),
        (DESCRIBED, DecodingConfig(draft="resident"), True),
        (GPU, DecodingConfig(draft="resident", mode="sparse"), True),
        (HERE, DecodingConfig(draft="resident"), False),
        (GPU, DecodingConfig(draft="resident", tree_width=2), False),
        (GPU, DecodingConfig(draft="resident", keep=1), False),
        (GPU, DecodingConfig(draft="streamed"), False),
        (GPU, DecodingConfig(mode="full"), False),
    ],
    ids=str,
)
def test_a_plan_has_room_for_recorded_draft_steps_where_a_device_records_them(
    hardware: Hardware, decoding: DecodingConfig, billed: bool
) -> None:
    config = EngineConfig(model="synthetic:small?dtype=F32", device_memory="1GiB", host_memory="1GiB", decoding=decoding)
    with_graphs, without = (plan_model(SMALL, replace(config, cuda_graphs=each), hardware) for each in (True, False))
    more = with_graphs.plan.device_bill["activations"] - without.plan.device_bill["activations"]
    assert more == (recorded_steps_nbytes(SMALL.spec, with_graphs.context, 4) if billed else 0)
    assert not without.records_drafts
    assert with_graphs.records_drafts or not billed


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "full"},
        {"draft": "streamed"},
        {"draft": "resident"},
        {"draft": "resident", "draft_quantize": "int4"},
        {"mode": "full", "kv_dtype": "int8"},
    ],
    ids=str,
)
def test_a_context_too_long_for_the_budget_is_refused_with_the_longest_that_works(settings: dict[str, Any]) -> None:
    kv_dtype = settings.get("kv_dtype", "auto")
    decoding = DecodingConfig(**{name: value for name, value in settings.items() if name != "kv_dtype"})
    config = EngineConfig(device_memory="16MiB", max_context=2048, decoding=decoding, kv_dtype=kv_dtype)
    remedies = r"--device-memory [^,]+, or (--draft streamed, or |--draft-quantize none, or )?--max-context \d+ at most$"
    with pytest.raises(BudgetError, match=remedies) as caught:
        plan_model(SMALL, config, HERE)
    longest = int(str(caught.value).split()[-3])
    assert 1 <= longest < 2048
    plan_model(SMALL, replace(config, max_context=longest), HERE)
    with pytest.raises(BudgetError):
        plan_model(SMALL, replace(config, max_context=longest + 1), HERE)


def test_where_no_context_fits_none_is_offered() -> None:
    with pytest.raises(BudgetError, match=r"give at least --device-memory [\w.]+$"):
        plan_model(SMALL, EngineConfig(device_memory="1MiB", decoding=DecodingConfig(mode="full")), HERE)
