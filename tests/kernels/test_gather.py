"""Gathered records: the kernel against the plain way. Without a GPU it runs in Triton's interpreter, in a process of its own,
since Triton decides when it is imported whether to compile."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload_sirius.kernels.gather import _kernel, gather, gather_reference, has_triton

CASES = [
    # records, width, type
    (7, 16, torch.uint8),
    (7, 13, torch.uint8),
    (20, 96, torch.bfloat16),
    (20, 33, torch.bfloat16),
    (5, 2500, torch.float32),
    (3, 2049, torch.int64),
    (150, 16, torch.uint8),  # more blocks than programs
]
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")


def table(num_records: int, width: int, dtype: torch.dtype) -> Tensor:
    """[F, R] of random bytes, those that are no numbers among them."""
    generator = torch.Generator().manual_seed(width)
    nbytes = num_records * width * dtype.itemsize
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator).view(dtype).view(num_records, width)


def kept_sets(num_records: int) -> list[list[int]]:
    """None, one, the last, every second, and all."""
    return [[], [0], [num_records - 1], list(range(0, num_records, 2)), list(range(num_records))]


def assert_kernel_is_reference(device: str, pinned: bool) -> None:
    """The same bytes for every case and every set."""
    for num_records, width, dtype in CASES:
        records = table(num_records, width, dtype)
        records = records.pin_memory() if pinned else records.to(device)
        for kept_indices in kept_sets(num_records):
            indices = torch.tensor(kept_indices, dtype=torch.int64, device=device)
            ours, plain = (torch.zeros(len(kept_indices), width, dtype=dtype, device=device) for _ in range(2))
            gather(records, indices, ours)
            gather_reference(records, indices, plain)
            assert torch.equal(ours.view(torch.uint8), plain.view(torch.uint8)), (num_records, width, dtype, kept_indices)


def test_the_reference_takes_rows_by_index() -> None:
    kept = torch.zeros(2, 3, dtype=torch.int64)
    gather_reference(torch.arange(12).view(4, 3), torch.tensor([1, 3]), kept)
    assert kept.tolist() == [[3, 4, 5], [9, 10, 11]]


@needs_triton
def test_the_kernel_in_the_interpreter_gathers_what_the_reference_does() -> None:
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('cases', {__file__!r})\n"
        "cases = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "cases.assert_kernel_is_reference('cpu', pinned=False)\n"
        "print('same')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


@needs_triton
def test_the_kernel_compiles_for_a_gpu_and_moves_sixteen_bytes_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton

    source = triton.compiler.ASTSource(
        _kernel(),
        signature={
            **dict.fromkeys(("records", "indices", "kept"), "*i64"),
            **dict.fromkeys(("num_words", "num_blocks", "num_programs"), "i32"),
            "BLOCK": "constexpr",
        },
        constexprs={"BLOCK": 1024},
        attrs={(argument,): [["tt.divisibility", 16]] for argument in (0, 2, 3)},
    )
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32))
    loads = [line for line in compiled.asm["ptx"].splitlines() if "ld.global" in line]
    assert sum("v2.b64" in line or "v4.b32" in line for line in loads) == len(loads) - 1, "all but the index"


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("pinned", [False, True], ids=["device", "pinned host"])
def test_the_kernel_on_a_gpu_gathers_what_the_reference_does(pinned: bool) -> None:
    assert_kernel_is_reference("cuda", pinned=pinned)
