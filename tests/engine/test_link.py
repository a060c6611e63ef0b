"""A device with memory of its own: the same answers by every route, and runs that go on where memory cannot be pinned."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import offload_sirius
from offload_sirius.config import DecodingConfig
from offload_sirius.engine import Engine, NoProgress
from offload_sirius.errors import BudgetError
from offload_sirius.units import MIB
from offload_sirius.weights.plan import CHUNK_NBYTES, NUM_CHUNKS, as_flag
from offload_sirius.weights.uploads import ChunkRoute, DiskRoute, PinnedRoute

from ..model.recording import TapeRecorder
from ..weights.simulated import SimulatedUplink
from .conftest import Budgets, Load, hot_budgets

PROMPT = list(range(1, 30))

WithUplink = Callable[..., SimulatedUplink]


@pytest.fixture
def with_uplink(monkeypatch: pytest.MonkeyPatch) -> Iterator[WithUplink]:
    """From now on models are loaded for a device with memory of its own."""
    made: list[SimulatedUplink] = []

    def install(**settings: int) -> SimulatedUplink:
        made.append(SimulatedUplink(**settings))  # type: ignore[arg-type]
        monkeypatch.setattr("offload_sirius.engine.building.uplink_to", lambda device: made[-1])
        return made[-1]

    yield install
    for uplink in made:
        uplink.close()


class Warned(NoProgress):
    """Writes down what it was warned of."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warn(self, line: str) -> None:
        self.lines.append(line)


def answer(engine: Engine) -> tuple[int, ...]:
    return engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True).token_ids


def routes_of(engine: Engine) -> set[type]:
    copier = engine._streamer._copier
    return {type(route) for route in copier._distinct}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("where", "routes"),
    [
        ("resident", set()),
        ("one resident, rest on the host", {PinnedRoute}),
        ("host and disk", {PinnedRoute, DiskRoute}),
        ("disk with the embedding", {DiskRoute}),
    ],
)
def test_answers_are_those_of_a_resident_model(
    where: str, routes: set[type], load: Load, budgets: Budgets, with_uplink: WithUplink
) -> None:
    expected = answer(load(dtype="float32", **budgets("resident")))
    uplink = with_uplink()
    engine = load(dtype="float32", **budgets(where))
    assert answer(engine) == answer(engine) == expected
    if routes:
        assert routes_of(engine) == routes
    assert uplink.from_pageable_nbytes == 0
    engine.close()
    assert uplink.pinned == {}


def test_a_device_that_refuses_to_pin_everything_answers_the_same_with_one_warning(
    load: Load, budgets: Budgets, with_uplink: WithUplink
) -> None:
    expected = answer(load(dtype="float32", **budgets("resident")))
    layer_nbytes = load(dtype="float32", **budgets("host")).plan.layer_nbytes
    chunks_nbytes = NUM_CHUNKS * CHUNK_NBYTES
    for limit, routes in (
        (0, {ChunkRoute}),
        (chunks_nbytes, {ChunkRoute}),
        (chunks_nbytes + 2 * (layer_nbytes + 4096), {PinnedRoute, ChunkRoute}),
    ):
        warned = Warned()
        uplink = with_uplink(max_pinned_nbytes=limit)
        engine = load(dtype="float32", progress=warned, **budgets("host"))
        assert routes_of(engine) == routes
        assert answer(engine) == expected
        [line] = warned.lines
        assert "of host memory could not be pinned (simulated error 2): what passes through it is copied twice" in line
        assert ("and a third time by the driver" in line) == (limit == 0)
        assert (uplink.from_pageable_nbytes > 0) == (limit == 0)
        assert "raise `ulimit -l`" in line


def test_staging_that_cannot_be_pinned_is_warned_of_and_passes_through_chunks(
    load: Load, budgets: Budgets, with_uplink: WithUplink
) -> None:
    expected = answer(load(dtype="float32", **budgets("resident")))
    warned = Warned()
    uplink = with_uplink(max_pinned_nbytes=NUM_CHUNKS * CHUNK_NBYTES)
    engine = load(dtype="float32", progress=warned, **budgets("disk"))
    assert answer(engine) == expected
    assert len(warned.lines) == 1
    assert uplink.from_pageable_nbytes == 0
    engine.close()
    assert uplink.pinned == {}


def test_what_is_pinned_is_in_the_figures(load: Load, budgets: Budgets, with_uplink: WithUplink) -> None:
    with_uplink()
    memory = load(**budgets("host")).generate(PROMPT, max_new_tokens=1).memory
    assert (memory.pinned_bytes > 0, memory.pageable_bytes) == (True, 0)
    with_uplink(max_pinned_nbytes=0)
    memory = load(progress=Warned(), **budgets("host")).generate(PROMPT, max_new_tokens=1).memory
    assert (memory.pinned_bytes, memory.pageable_bytes > 0) == (0, True)


def test_python_is_warned_in_its_own_way(load: Load, budgets: Budgets, with_uplink: WithUplink) -> None:
    with_uplink(max_pinned_nbytes=0)
    with pytest.warns(UserWarning, match="could not be pinned"):
        load(**budgets("host"))


def test_the_bytes_of_a_pass_are_those_of_the_plan_by_every_route(load: Load, budgets: Budgets, with_uplink: WithUplink) -> None:
    for settings in ({}, {"max_pinned_nbytes": 0}):
        with_uplink(**settings)
        engine = load(progress=Warned(), **budgets("host and disk"))
        result = engine.generate(PROMPT, max_new_tokens=5, ignore_eos=True)
        assert result.link.bytes.full == 4 * engine.plan.pass_nbytes
        assert result.link.bytes.prefill == engine.plan.pass_nbytes


def test_memory_that_runs_out_half_way_leaves_nothing_pinned(
    load: Load, budgets: Budgets, with_uplink: WithUplink, monkeypatch: pytest.MonkeyPatch
) -> None:
    uplink = with_uplink()
    made = budgets("disk")
    mapping, num_mapped = mmap.mmap, 0

    def refuse_the_staging(*arguments: object, **settings: int) -> mmap.mmap:
        nonlocal num_mapped
        num_mapped += 1
        if num_mapped > 2:  # the readers' buffers, the chunks
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return mapping(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("offload_sirius.weights.mapping.mmap.mmap", refuse_the_staging)
    with pytest.raises(BudgetError, match="memory ran out"):
        load(**made)
    assert uplink.most_pinned_nbytes == NUM_CHUNKS * CHUNK_NBYTES
    assert uplink.pinned == {}


def test_residents_pass_through_the_arena_before_it_is_filled(load: Load, budgets: Budgets, with_uplink: WithUplink) -> None:
    uplink = with_uplink()
    engine = load(**budgets("one resident, rest on the host"))
    assert len(engine.plan.host_layers) == 3
    assert len(uplink.pinned) == 3, "neither staging beside the arena, nor chunks that nobody needs"


@pytest.mark.parametrize(
    ("sparsity", "where"),
    [
        ("griffin", "one resident, rest on the host"),
        ("griffin", "host"),
        ("griffin", "host + kept"),
        ("griffin", "host and disk"),
        ("griffin", "disk + kept"),
        ("cats", "host"),
        ("cats", "host + caches"),
        ("cats", "host and disk"),
    ],
)
def test_corrected_drafts_are_the_full_model_s_answers_by_every_route(
    sparsity: Any, where: str, load: Load, budgets: Budgets, with_uplink: WithUplink
) -> None:
    expected = answer(load(dtype="float32", **budgets("resident")))
    decoding = DecodingConfig(sparsity=sparsity, keep=0.4, window=4)
    settings = {"mode": "sirius", "dtype": "float32", "decoding": decoding, **budgets(where, decoding=decoding)}
    sparse = load(**settings).generate(PROMPT, mode="sparse", max_new_tokens=12, ignore_eos=True)
    uplink = with_uplink()
    engine = load(**settings)
    assert answer(engine) == answer(engine) == expected
    found = engine.generate(PROMPT, mode="sparse", max_new_tokens=12, ignore_eos=True)
    assert found.token_ids == sparse.token_ids, "the simulated device drafts what the CPU does"
    if "caches" not in where:  # which remember the answers before
        assert found.link.bytes.draft == sparse.link.bytes.draft
    assert uplink.from_pageable_nbytes == 0
    engine.close()
    assert uplink.pinned == {}
    with_uplink(max_pinned_nbytes=0)
    assert answer(load(progress=Warned(), **settings)) == expected


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("refresh", [True, False])
@pytest.mark.parametrize(("num_hot_layers", "keep"), [(None, 0.4), (2, 0.1)])
def test_drafts_on_the_device_are_corrected_to_the_full_model_s_answers_whether_or_not_memory_can_be_pinned(
    num_hot_layers: int | None,
    keep: float,
    refresh: bool,
    recorded: bool,
    load: Load,
    budgets: Budgets,
    with_uplink: WithUplink,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorder = TapeRecorder()
    monkeypatch.setattr("offload_sirius.engine.building.recorder_on", lambda device: recorder if recorded else None)
    expected = answer(load(dtype="float32", **budgets("resident")))
    decoding = DecodingConfig(keep=keep, window=4, draft="resident", refresh=refresh)
    given = hot_budgets(decoding, num_slots=3 if num_hot_layers is None else 2, num_hot_layers=num_hot_layers)
    settings = {"mode": "sirius", "draft": "resident", "decoding": decoding, **given}
    uplink = with_uplink()
    engine = load(**settings)
    assert engine.plan.hot is not None
    assert len(engine.plan.hot.layers) == (num_hot_layers or 4)
    assert answer(engine) == answer(engine) == expected
    found = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    assert (found.link.bytes.draft > 0) == (num_hot_layers is not None)
    assert found.link.bytes.correction == found.passes.correction * engine.plan.pass_nbytes
    assert engine._streamer.copied_nbytes >= sum(engine._streamer.pass_nbytes.values())
    assert (recorder.num_played >= found.passes.draft) == (recorded and num_hot_layers is None)
    assert uplink.from_pageable_nbytes == 0
    engine.close()
    assert uplink.pinned == {}
    with_uplink(max_pinned_nbytes=0)
    assert answer(load(progress=Warned(), **settings)) == expected


_UNDER_A_LIMIT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("simulated", sys.argv[1])
simulated = importlib.util.module_from_spec(spec)
sys.modules["simulated"] = simulated
spec.loader.exec_module(simulated)
import offload_sirius.engine.building as building
building.uplink_to = lambda device: simulated.SimulatedUplink(lock=True)
from offload_sirius.cli import main
sys.exit(main(sys.argv[2:]))
"""


_HARD_LIMIT = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
LIMIT_NBYTES = 64 * MIB if _HARD_LIMIT == resource.RLIM_INFINITY else min(64 * MIB, _HARD_LIMIT)


def _held_to_the_limit() -> None:
    """Root may lock as much as it likes: a process that begins without the right to is held to the limit."""
    ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_IPC_LOCK
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (LIMIT_NBYTES, LIMIT_NBYTES))


def test_a_memlock_limit_of_64_mib_ends_in_a_run_that_works_with_the_warning() -> None:
    simulated = Path(__file__).parents[1] / "weights" / "simulated.py"
    model = "synthetic:tiny?width=512&ffn=8192&layers=6"
    generate = ["generate", "--model", model, "--device", "cpu", "--prompt", "hi", "--max-new-tokens", "3", "--json"]
    shape = offload_sirius.load(model, device="cpu").plan
    two_slots = shape.device_nbytes - shape.device_bill["resident_layers"] + 2 * shape.layer_nbytes
    ran = subprocess.run(
        [sys.executable, "-c", _UNDER_A_LIMIT, str(simulated), *generate, "--device-memory", str(two_slots)],
        preexec_fn=_held_to_the_limit,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    assert figures["new_tokens"] == 3
    assert figures["plan"]["host_bill"]["layers"] > LIMIT_NBYTES
    [line] = [line for line in ran.stderr.splitlines() if line.startswith("warning: ")]
    assert "could not be pinned (mlock: errno 12)" in line
    assert f"raise `ulimit -l` (now {as_flag(LIMIT_NBYTES)})" in line
