"""What is chosen among candidates, and that a plan knows its bytes before anything counts them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload_sirius import machine
from offload_sirius.config import EngineConfig, PlanConfig
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
from offload_sirius.rates import NAMES, Stored, rates_file, rates_from, write_rates
from offload_sirius.weights.pieces import load_nbytes
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


AUTO = EngineConfig(model="synthetic:small?dtype=F32", auto=True)


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
    assert [each.dtype for each in alternatives(EngineConfig(), SMALL.spec)] == ["float32"]
    assert [each.dtype for each in alternatives(EngineConfig(auto=True, dtype="bfloat16"), SMALL.spec)] == ["bfloat16"]


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
