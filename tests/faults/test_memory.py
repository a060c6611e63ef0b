"""Memory of a device that runs out though there was enough when the plan was made. That of the host: engine/test_building.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from offload_sirius.cli import main
from offload_sirius.engine import building
from offload_sirius.weights.device import DeviceStore
from offload_sirius.weights.host import allocate_bytes

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
