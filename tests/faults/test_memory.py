"""Memory that runs out though there was enough when the plan was made."""

from __future__ import annotations

import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from offload_sirius.cli import main
from offload_sirius.engine import building, placement
from offload_sirius.engine.placement import hardware_of
from offload_sirius.engine.planning import Hardware
from offload_sirius.weights.device import DeviceStore
from offload_sirius.weights.host import allocate_bytes
from offload_sirius.weights.plan import Plan

TINY = "synthetic:tiny?dtype=F32"
ASKED = (
    "generate",
    "--model",
    TINY,
    "--prompt",
    "hi",
    "--max-new-tokens",
    "4",
    "--mode",
    "full",
    "--device",
    "cpu",
    "--threads",
    "1",
)
RAN_OUT = (
    r"(memory ran out; the plan takes .* on the device and .* on the host: give smaller --device-memory or --host-memory"
    r"|device memory ran out while allocating .*; give a smaller --device-memory)\n"
)
Capture = pytest.CaptureFixture[str]


IN_A_LIMIT = """
import resource, sys
from pathlib import Path
from offload_sirius.cli import main
from offload_sirius.engine import building, engine

def limited(*arguments, **named):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20),) * 2)
    return call(*arguments, **named)

room, name = {"loading": (building, "DeviceStore"), "running": (engine, "decode_full")}[sys.argv[1]]
call = getattr(room, name)
setattr(room, name, limited)
sys.exit(main(sys.argv[2:]))
"""
"""From that call on a process gets a MiB more than it has, and nothing else."""


@pytest.mark.parametrize("moment", ["loading", "running"])
def test_memory_of_the_host_that_runs_out_is_one_line(moment: str) -> None:
    given = [*ASKED, "--model", f"{TINY}&positions=1024&ffn=65536", "--prompt", "a" * 600]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_LIMIT, moment, *given], capture_output=True, text=True, check=False, timeout=240
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch("error: " + RAN_OUT, done.stderr)


class Shrunk(DeviceStore):
    """A device that others have taken memory of since the plan was made."""

    free_nbytes = 0
    asked: list[int] = []  # noqa: RUF012  set by each test

    def __init__(self, plan: Any, *rest: Any) -> None:
        self.asked.append(plan.device_nbytes)
        if plan.device_nbytes > self.free_nbytes:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(torch, "empty", self.refuse)
                self.take(plan.device_nbytes)
        super().__init__(plan, *rest)

    take: Callable[[int], object]
    """How: by what allocates slots and residents, or by anything else, an operation's result for one."""

    @staticmethod
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.fixture(params=[lambda nbytes: allocate_bytes(nbytes, torch.device("cpu"), "device"), lambda nbytes: torch.empty(nbytes)])
def shrunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Shrunk]:
    monkeypatch.setattr(Shrunk, "take", staticmethod(request.param), raising=False)
    monkeypatch.setattr(building, "DeviceStore", Shrunk)
    monkeypatch.setattr(Shrunk, "asked", [])
    return Shrunk


def test_a_device_without_memory_is_tried_once_more_with_a_smaller_plan(
    shrunk: type[Shrunk], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrunk, "free_nbytes", 1 << 40)
    assert main(ASKED) == 0
    whole, [planned] = capsys.readouterr().out, shrunk.asked
    monkeypatch.setattr(shrunk, "free_nbytes", planned - 1)
    monkeypatch.setattr(shrunk, "asked", [])
    assert main(ASKED) == 0
    captured = capsys.readouterr()
    assert captured.out == whole
    first, second = shrunk.asked
    assert first == planned
    assert second <= planned * building.RETRY_SHARE
    assert re.match(r"warning: the device's memory ran out while the model was loaded; once more with \S+ \w+\n", captured.err)


def test_a_second_plan_is_made_when_the_memory_of_the_first_is_free_again(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = weakref.WeakSet[DeviceStore]()
    plans = list[Plan]()

    class Refused(DeviceStore):
        """The first one runs out of memory when it has most of it."""

        def __init__(self, plan: Plan, *rest: Any) -> None:
            super().__init__(plan, *rest)
            held.add(self)
            plans.append(plan)
            if len(plans) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def hardware(device: torch.device) -> Hardware:
        free_nbytes = (1 << 20) - sum(store.nbytes for store in held)
        return replace(hardware_of(device), own_memory=True, free_device_nbytes=free_nbytes)

    monkeypatch.setattr(building, "DeviceStore", Refused)
    monkeypatch.setattr(placement, "hardware_of", hardware)
    assert main([*ASKED, "--device-memory", "900KiB", "--host-memory", "64MiB"]) == 0
    first, second = plans
    assert second.device_nbytes <= first.device_nbytes * building.RETRY_SHARE
    assert "once more with" in capsys.readouterr().err


def test_a_device_that_has_too_little_for_that_too_is_one_line(shrunk: type[Shrunk], capsys: Capture) -> None:
    assert main(ASKED) == 2
    captured = capsys.readouterr()
    assert len(shrunk.asked) == 2
    assert captured.out == ""
    assert re.fullmatch(
        r"warning: .*\nerror: " + RAN_OUT,
        captured.err,
    )


def test_no_smaller_plan_than_works_is_tried(shrunk: type[Shrunk], capsys: Capture) -> None:
    assert main([*ASKED, "--device-memory", "1KiB"]) == 2
    [least] = re.findall(r"give at least --device-memory ([^\s,]+)", capsys.readouterr().err)
    assert main([*ASKED, "--device-memory", least]) == 2
    assert len(shrunk.asked) == 1
    assert re.fullmatch("error: " + RAN_OUT, capsys.readouterr().err)
