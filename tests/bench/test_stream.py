"""Measured passes of a small model: bytes from counters, ceilings by tier, and gaps that add up to what was waited."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_sirius.bench import stream
from offload_sirius.bench.stream import StreamReport, measure_stream, pass_seconds, streaming_config
from offload_sirius.config import EngineConfig
from offload_sirius.engine import NoProgress, build, open_model
from offload_sirius.engine.placement import place
from offload_sirius.errors import ConfigError
from offload_sirius.trace import Tracer
from offload_sirius.weights.layout import PAGE_NBYTES, align
from offload_sirius.weights.plan import MIN_READERS

MODEL = "synthetic:tiny?dtype=F32&layers=8"
CONFIG = EngineConfig(model=MODEL, device="cpu", threads=1)
OPENED = open_model(MODEL)
NUM_PASSES = 3


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_walks: int) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))


def config_for(**settings: Any) -> EngineConfig:
    return streaming_config(
        OPENED, replace(CONFIG, **settings), num_passes=NUM_PASSES, all_streamed="device_memory" not in settings
    )


def report_of(config: EngineConfig) -> StreamReport:
    tracer = Tracer()
    with build(OPENED, config, NoProgress(), tracer) as engine:
        return measure_stream(engine, tracer, NUM_PASSES)


def test_without_a_budget_every_layer_is_streamed_through_as_many_slots_as_that_leaves() -> None:
    plan = place(OPENED.checkpoint, config_for()).plan
    assert plan.streamed_layers == tuple(range(8))
    more = config_for(device_memory=str(plan.device_nbytes + plan.layer_nbytes))
    assert place(OPENED.checkpoint, more).plan.resident_layers != ()


def test_a_model_that_fits_into_the_budget_is_not_measured() -> None:
    with pytest.raises(ConfigError) as caught:
        config_for(device_memory="1GiB")
    assert str(caught.value) == (
        f"all 8 layers of {MODEL} would be resident, and nothing to measure; "
        "leave out --device-memory, or give a model with more layers"
    )


def test_more_passes_than_the_model_has_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--passes is 2039; .* has room for 2038 after prompt and warm-up"):
        streaming_config(OPENED, CONFIG, num_passes=2039, all_streamed=True)


def test_a_pass_over_an_emulated_link_is_held_against_its_rate() -> None:
    config = config_for(link_gbps=0.1)
    plan = place(OPENED.checkpoint, config).plan
    report = report_of(config)
    assert (report.model, report.device, report.num_slots) == (MODEL, "cpu", plan.num_slots)
    assert report.pass_nbytes == plan.pass_nbytes == 8 * plan.layer_nbytes
    [ceiling] = report.ceilings
    assert (ceiling.what, ceiling.bytes_per_second, ceiling.nbytes) == ("the emulated link's rate", 0.1e9, plan.pass_nbytes)
    assert report.link_share == pytest.approx(plan.pass_nbytes / 0.1e9 / report.seconds.median)
    assert len(report.all_seconds) == NUM_PASSES
    assert 0 < report.copy_busy_share <= 1
    assert [(gap.layer, gap.tier) for gap in report.layers] == [(layer, "host") for layer in range(8)]
    assert 0 < report.gap_seconds < report.seconds.highest


def test_each_tier_has_a_ceiling_and_the_slower_one_bounds_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = place(OPENED.checkpoint, config_for())
    whole, readers = placement.plan, placement.planned.demand.reading.nbytes(MIN_READERS)
    host_memory = str(readers + whole.host_bill["embedding"] + 3 * align(whole.layer_nbytes, PAGE_NBYTES))
    monkeypatch.setattr(stream, "read_seconds", lambda files, nbytes, *queue: nbytes / 1000)
    report = report_of(config_for(host_memory=host_memory))
    assert [gap.tier for gap in report.layers].count("disk") == 5
    disk, memory = report.ceilings
    assert (disk.what, disk.bytes_per_second) == ("plain reads of the files", 1000)
    stored_layer_nbytes = sum(info.nbytes for (layer, _), info in OPENED.checkpoint.tensors.items() if layer == 0)
    assert disk.nbytes == 5 * stored_layer_nbytes
    assert (memory.what, memory.nbytes) == ("memory copies by one thread", 3 * whole.layer_nbytes)
    assert report.bound == disk


def test_resident_layers_are_never_waited_for() -> None:
    plan = place(OPENED.checkpoint, config_for()).plan
    report = report_of(config_for(device_memory=str(plan.device_nbytes + plan.layer_nbytes)))
    resident = [gap for gap in report.layers if gap.tier == "resident"]
    assert resident
    assert all(gap.seconds == 0 for gap in resident)


def test_json_has_the_figures_that_are_derived_too() -> None:
    report = report_of(config_for(link_gbps=1.0))
    told = report.as_json()
    assert (told["bound"], told["link_share"]) == ("the emulated link's rate", report.link_share)
    assert told["seconds"] == vars(report.seconds)
    assert told["gbytes_per_second"] == report.pass_nbytes / report.seconds.median / 1e9
    assert told["gap_seconds"] == sum(layer["seconds"] for layer in told["layers"])


def test_the_passes_that_count_are_those_behind_the_warm_up() -> None:
    with build(OPENED, config_for(), NoProgress()) as engine:
        assert len(pass_seconds(engine, NUM_PASSES)) == NUM_PASSES
        assert all(seconds > 0 for seconds in pass_seconds(engine, 1))
