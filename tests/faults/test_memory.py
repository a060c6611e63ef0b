"""Memory that runs out though there was enough when the plan was made."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from offload_sirius.cli import main
from offload_sirius.engine import building
from offload_sirius.weights.device import DeviceStore

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
RAN_OUT = r"memory ran out; the plan takes .* on the device and .* on the host: give smaller --device-memory or --host-memory\n"
Capture = pytest.CaptureFixture[str]

IN_A_LIMIT = """
import resource, sys
import numpy.random
from pathlib import Path
from offload_sirius.cli import main
from offload_sirius.engine import engine, building

def limit(*arguments, **named):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + room_nbytes,) * 2)
    return call(*arguments, **named)

where = {"loading": (building, "make_arenas", 16 << 20), "running": (engine, "decode_full", 1 << 20)}
room, name, room_nbytes = where[sys.argv[1]]
call = getattr(room, name)
setattr(room, name, limit)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("moment", ["loading", "running"])
def test_memory_that_runs_out_is_one_line(moment: str) -> None:
    """A limit on the process's addresses, not far above what it has; the model then takes more."""
    model, prompt = (TINY + "&ffn=16384", "hi") if moment == "loading" else (TINY + "&positions=4096", "a" * 3000)
    given = ["generate", "--model", model, "--prompt", prompt, "--max-new-tokens", "4", "--mode", "full", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_LIMIT, moment, *given, "--threads", "1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        "error: " + RAN_OUT,
        done.stderr,
    )


class Shrunk(DeviceStore):
    """A device that others have taken memory of since the plan was made."""

    free_nbytes = 0
    asked: list[int] = []  # noqa: RUF012  set by each test

    def __init__(self, plan: Any, *rest: Any) -> None:
        self.asked.append(plan.device_nbytes)
        if plan.device_nbytes > self.free_nbytes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        super().__init__(plan, *rest)


@pytest.fixture
def shrunk(monkeypatch: pytest.MonkeyPatch) -> type[Shrunk]:
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
    assert capsys.readouterr().err.startswith("error: memory ran out; the plan takes ")
