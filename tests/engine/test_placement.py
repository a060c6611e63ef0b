"""What is decided before a byte is allocated: device, dtype, context, and budgets out of what is free."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.config import Dtype, EngineConfig
from offload_sirius.engine.placement import Placement, find_device, memory_errors, place
from offload_sirius.engine.planning import DEFAULT_CONTEXT, HOST_RESERVE_NBYTES, context_of, dtype_of
from offload_sirius.errors import BudgetError, ConfigError, DeviceError
from offload_sirius.units import GIB, MIB, parse_size
from offload_sirius.weights.plan import MAX_READERS
from offload_sirius_loaders import open_checkpoint

MODEL = "synthetic:llama-3-8b?layers=8"
CHECKPOINT = open_checkpoint(MODEL)
ON_CPU = EngineConfig(model=MODEL, device="cpu")


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_free_memory(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has that much left once the program itself is served."""
    monkeypatch.setattr("offload_sirius.machine.free_host_nbytes", lambda: nbytes + HOST_RESERVE_NBYTES)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("name", "index"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_found_by_its_number_and_auto_is_the_first(name: str, index: int) -> None:
    assert find_device(name) == torch.device("cuda", index)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_is_not_there_is_refused_with_the_last_that_is() -> None:
    with pytest.raises(DeviceError, match="--device cuda:2: the last CUDA device is cuda:1; use one up to it"):
        find_device("cuda:2")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused() -> None:
    assert find_device("auto") == find_device("cpu") == torch.device("cpu")
    with pytest.raises(DeviceError, match=r"--device cuda: torch .* sees no CUDA device; use --device cpu"):
        find_device("cuda")


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [
        ("F32", "auto", "float32"),
        ("BF16", "auto", "bfloat16"),
        ("F16", "auto", "bfloat16"),
        ("Q4_1", "auto", "bfloat16"),
        ("BF16", "float32", "float32"),
        ("F32", "bfloat16", "bfloat16"),
    ],
)
def test_the_dtype_is_as_asked_or_follows_what_is_stored(stored: str, asked: Dtype, dtype: str) -> None:
    spec = replace(CHECKPOINT.spec, stored_dtype=stored)
    assert dtype_of(EngineConfig(dtype=asked), spec) == dtype


@pytest.mark.parametrize(("asked", "positions", "context"), [(None, 8192, DEFAULT_CONTEXT), (None, 64, 64), (64, 64, 64)])
def test_the_context_is_as_asked_or_the_default_within_what_the_model_has(
    asked: int | None, positions: int, context: int
) -> None:
    spec = replace(CHECKPOINT.spec, max_positions=positions)
    assert context_of(EngineConfig(max_context=asked), spec) == context


def test_a_context_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max-context is 65; .* has 64 positions"):
        context_of(EngineConfig(max_context=65), replace(CHECKPOINT.spec, max_positions=64))


@given(free_mib=st.integers(5000, 60_000), device_share=st.floats(0.8, 1.0), host_share=st.floats(0.5, 1.0))
def test_shares_of_one_memory_never_exceed_it(free_mib: int, device_share: float, host_share: float) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        with_free_memory(free_mib * MIB, monkeypatch)
        config = replace(ON_CPU, device_memory=f"{device_share:.3f}", host_memory=f"{host_share:.3f}")
        plan = place(CHECKPOINT, config).plan
    assert plan.device_nbytes + plan.host_nbytes <= free_mib * MIB


def test_the_default_budgets_leave_a_disk_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(4 * GIB, monkeypatch)
    plan = place(CHECKPOINT, ON_CPU).plan
    assert plan.disk_layers
    assert plan.num_readers >= MAX_READERS // 2


def test_what_a_message_says_is_free_may_be_given_as_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(4 * GIB, monkeypatch)
    with pytest.raises(BudgetError) as caught:
        place(CHECKPOINT, replace(ON_CPU, device_memory="100GiB"))
    most = str(caught.value).rpartition(" at most ")[2]
    assert parse_size(most).resolve(0) <= 4 * GIB
    assert place(CHECKPOINT, replace(ON_CPU, device_memory=most)).plan.device_nbytes <= 4 * GIB


def on_cuda(monkeypatch: pytest.MonkeyPatch, *, free_device: int, free_host: int, **settings: Any) -> Placement:
    """The placement on a GPU with that much free memory; nothing is allocated on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_device, free_device))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    with_free_memory(free_host, monkeypatch)
    return place(CHECKPOINT, EngineConfig(model=MODEL, **settings))


def test_a_gpu_and_its_host_have_budgets_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = on_cuda(monkeypatch, free_device=4 * GIB, free_host=64 * GIB)
    assert placement.device == torch.device("cuda", 0)
    assert placement.plan.host_layers
    assert not placement.plan.disk_layers
    assert 3 * GIB < placement.plan.device_nbytes <= 4 * GIB * 0.9


@pytest.mark.parametrize(
    ("settings", "free_device", "free_host", "message"),
    [
        (
            {"device_memory": "3GiB"},
            2 * GIB,
            64 * GIB,
            r"device memory: the plan takes 2\.\d\d GiB, 2\.00 GiB are free; give smaller --device-memory, at most 1\.98GiB",
        ),
        (
            {"host_memory": "60GiB"},
            4 * GIB,
            2 * GIB,
            r"host memory: the plan takes \d\.\d\d GiB, 2\.00 GiB are free; give smaller --host-memory, at most 1\.98GiB",
        ),
    ],
)
def test_a_budget_above_what_is_free_is_refused(
    settings: dict[str, str], free_device: int, free_host: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BudgetError, match=message):
        on_cuda(monkeypatch, free_device=free_device, free_host=free_host, **settings)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ],
)
def test_every_way_to_run_out_of_memory_becomes_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(32 * GIB, monkeypatch)
    plan = place(CHECKPOINT, ON_CPU).plan
    with pytest.raises(BudgetError) as caught, memory_errors(plan):
        raise error
    assert str(caught.value).startswith("memory ran out; the plan takes ")
    assert str(caught.value).endswith(": give smaller --device-memory or --host-memory")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), OSError(errno.EIO, "no"), ValueError(), KeyboardInterrupt()]
)
def test_other_errors_pass_as_they_are(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free_memory(32 * GIB, monkeypatch)
    plan = place(CHECKPOINT, ON_CPU).plan
    with pytest.raises(type(error)) as caught, memory_errors(plan):
        raise error
    assert caught.value is error
