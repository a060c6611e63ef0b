"""Products with quantised rows: every way against plain torch. Without a GPU the Triton kernels run in Triton's interpreter, in a
process of its own, since Triton decides when it is imported whether to compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_sirius.kernels import cpu
from offload_sirius.kernels.gather import has_triton
from offload_sirius.kernels.native import Native
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.kernels.quantized import (
    ACTIVATIONS,
    down_reference,
    gate_up_reference,
    linear_reference,
    quantized_down,
    quantized_gate_up,
    quantized_linear,
    quantized_weights,
)
from offload_sirius.quantization import GROUPS, KINDS, WeightFormat
from offload_sirius.weights.quant import quantise_rows

FORMATS = [WeightFormat(kind=kind, group=group) for kind in KINDS for group in GROUPS]
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def records(num_rows: int, width: int, form: WeightFormat, device: str = "cpu") -> tuple[QuantizedRows, QuantizedRows]:
    """Two families of rows that lie in turn, as up and down of a neuron do."""
    storage = torch.empty(num_rows, 2, form.row_nbytes(width), dtype=torch.uint8)
    for index in range(2):
        quantise_rows(normal(num_rows, width) + index, form, storage[:, index])
    storage = storage.to(device)
    return QuantizedRows(storage[:, 0], width, form), QuantizedRows(storage[:, 1], width, form)


def assert_near(ours: Tensor, plain: Tensor, tolerance: float) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == plain.shape
    assert (ours - plain).abs().max() <= tolerance * plain.abs().max(), ((ours - plain).abs().max(), plain.abs().max())


def assert_products_are_references(
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    forms: Sequence[WeightFormat] = FORMATS,
    shapes: Sequence[tuple[int, int, int]] = ((37, 200, 3), (5, 41, 1), (300, 96, 1), (20, 96, 17)),
) -> None:
    """Odd numbers of rows and weights, one token and some."""
    for form in forms:
        for num_rows, width, num_tokens in shapes:
            gate, up = records(num_rows, width, form, device)
            x = normal(num_tokens, width).to(device, dtype)
            assert_near(quantized_linear(x, gate), linear_reference(x, gate), tolerance)
            activation = ACTIVATIONS[num_rows % 3]
            assert_near(quantized_gate_up(x, gate, up, activation), gate_up_reference(x, gate, up, activation), tolerance)
            z = normal(num_tokens, num_rows).to(device, dtype)
            assert_near(quantized_down(z, up), down_reference(z, up), tolerance)
            assert torch.equal(quantized_weights(up, dtype), up.dequantised().to(dtype))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_references_are_products_of_the_weights_that_rows_stand_for(form: WeightFormat) -> None:
    gate, up = records(300, 70, form)  # more rows than are held in float32 at once
    x, z = normal(3, 70), normal(3, 300)
    linear = x @ gate.dequantised().t()
    assert_near(linear_reference(x, gate), linear, 1e-6)
    expected = torch.nn.functional.silu(linear) * (x @ up.dequantised().t())
    assert_near(gate_up_reference(x, gate, up, "silu"), expected, 1e-6)
    assert_near(down_reference(z, up), z @ up.dequantised(), 1e-6)


@pytest.mark.parametrize("with_library", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_on_a_cpu_are_the_reference_with_a_compiler_and_without(
    form: WeightFormat, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(cpu, "native", lambda name: Native(library=None, problem="no compiler"))
    gate, up = records(37, 200, form)
    x, z = normal(3, 200).bfloat16(), normal(3, 37)
    assert_near(quantized_linear(x, gate), linear_reference(x, gate), 2e-6)
    assert_near(quantized_gate_up(x, gate, up, "gelu"), gate_up_reference(x, gate, up, "gelu"), 2e-6)
    assert_near(quantized_down(z, up), down_reference(z, up), 2e-6)


@needs_triton
def test_the_kernels_in_the_interpreter_give_what_the_references_do() -> None:
    program = (
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('cases', {__file__!r})\n"
        "cases = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "from offload_sirius.kernels import quantized\n"
        "quantized._on_gpu = lambda x: True\n"
        "cases.assert_products_are_references('cpu', torch.float32, 2e-5)\n"
        "print('same')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


@needs_triton
@pytest.mark.parametrize("form", [WeightFormat(kind=kind, group=group) for kind in KINDS for group in (32, 128)], ids=str)
def test_the_kernels_compile_for_a_gpu_and_multiply_on_tensor_cores(
    form: WeightFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from offload_sirius.kernels import quantized_gpu as gpu

    int4 = form.kind == "int4"
    constants = {"INT4": int4, "GROUP": form.group}
    integers = "*u8" if int4 else "*i8"
    types = {"x": "*bf16", "z": "*bf16", "out": "*fp32", "parts": "*fp32"}
    size = {"BLOCK_ROWS": 16, "UNROLL": 2}
    for kernel, own in (
        (gpu._linear_rows, {"ACTIVATION": "silu", "BLOCK_ROWS": 32, "BLOCK_TOKENS": 16}),
        (gpu._linear_of_one, {"ACTIVATION": "silu", **size}),
        (gpu._down_of_one, size),
        (gpu._weights, {"BLOCK_ROWS": 16}),
    ):
        constexprs = {**constants, **own}
        signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}
        signature |= {name: integers for name in signature if name.endswith(("integers", "zeros"))}
        signature |= {name: "*fp16" for name in signature if name.endswith(("scales", "rests"))}
        signature |= {name: "*i16" for name in signature if name.endswith("places")}
        wide = [
            place
            for place, name in enumerate(kernel.arg_names)
            if signature[name].startswith("*") or name in ("stride", "gate_stride", "up_stride", "width")
        ]
        source = _compile_source(kernel, signature, constexprs, wide)
        assert ("mma.sync" in source) == (kernel is gpu._linear_rows)


def _compile_source(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], wide: list[int]) -> str:
    """PTX for a GPU of compute capability 8.0. wide: places of arguments that are multiples of 16."""
    import triton

    source = triton.compiler.ASTSource(
        kernel, signature=signature, constexprs=constexprs, attrs={(place,): [["tt.divisibility", 16]] for place in wide}
    )
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32))
    return str(compiled.asm["ptx"])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_public_products_on_a_gpu_are_the_references(form: WeightFormat, dtype: torch.dtype, tolerance: float) -> None:
    assert_products_are_references("cuda", dtype, tolerance, [form], [(37, 200, 3), (300, 96, 1), (20, 96, 70)])


@pytest.mark.gpu
@needs_triton
def test_large_matrices_on_a_gpu_give_what_the_references_do() -> None:
    form = WeightFormat(kind="int4", group=128)
    shapes = [(quantized_gpu_rows() + 40, 256, num_tokens) for num_tokens in (1, 17)]
    assert_products_are_references("cuda", torch.bfloat16, 1e-2, [form], shapes)


def quantized_gpu_rows() -> int:
    """From so many on programs have more rows."""
    from offload_sirius.kernels import quantized_gpu

    return quantized_gpu.FEW_ROWS
