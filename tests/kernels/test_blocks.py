"""Rows of blocks stand for what the gguf library says, along the inputs and regrouped by neuron; C gives what torch does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from offload_sirius.blocks import BLOCK_FORMATS, BlockFormat
from offload_sirius.kernels import blocks_cpu
from offload_sirius.kernels.block_products import (
    block_down,
    block_linear,
    block_weights,
    down_reference,
    linear_reference,
    write_outputs,
)
from offload_sirius.kernels.blocks import BlockRows, NeuronRows
from offload_sirius.kernels.gather import has_triton
from offload_sirius.kernels.matrix import combine, project
from offload_sirius.kernels.native import Native
from offload_sirius.quantization import FEW_TOKENS

FORMATS = list(BLOCK_FORMATS.values())
needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")


def stored_rows(num_rows: int, width: int, form: BlockFormat) -> Tensor:
    """Random rows as a file has them: any bits are codes and scales, and halves are small numbers."""
    generator = np.random.default_rng(num_rows + width + form.bits)
    raw = generator.integers(0, 256, (num_rows, width // form.block, form.block_nbytes), np.uint8)
    halves = generator.uniform(-0.1, 0.1, (num_rows, width // form.block, 2)).astype(np.float16).view(np.uint8)
    if form.name == "Q6_K":
        raw[..., -2:] = halves[..., :2]
    else:
        raw[..., : 2 + 2 * form.has_minimum] = halves[..., : 2 + 2 * form.has_minimum]
    return torch.from_numpy(raw.reshape(num_rows, -1))


def plain(stored: Tensor, form: BlockFormat) -> Tensor:
    """What the gguf library makes of them."""
    return torch.from_numpy(dequantize(stored.numpy(), GGMLQuantizationType[form.name]))


def neurons_of(stored: Tensor, num_neurons: int, form: BlockFormat, step: int = 32) -> NeuronRows:
    """A down projection [D, F] of blocks, regrouped in pieces of that many outputs, in records with other bytes around."""
    width = len(stored)
    records = torch.full((num_neurons, 4 + form.column_nbytes(width) + 12), 255, dtype=torch.uint8)
    table = torch.full(form.table_shape(num_neurons, width), 255, dtype=torch.uint8)
    numbers, codes = records[:, :4].view(torch.int32)[:, 0], records[:, 4 : 4 + form.column_nbytes(width)]
    rows = NeuronRows(numbers, codes, table, width, form)
    for first in range(0, width, step):
        write_outputs(rows, first, stored[first : first + step])
    return rows


def records_of(numbers: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The same, in records of both."""
    records = torch.cat((numbers[:, None].view(torch.uint8), codes), dim=1)
    return records[:, :4].view(torch.int32)[:, 0], records[:, 4:]


def assert_near(ours: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert ours.dtype == torch.float32
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_format_has_the_bytes_that_the_library_says(form: BlockFormat) -> None:
    assert (form.block, form.block_nbytes) == GGML_QUANT_SIZES[GGMLQuantizationType[form.name]]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_rows_stand_for_what_the_library_makes_of_them_bit_for_bit(form: BlockFormat) -> None:
    stored = stored_rows(5, 512, form)
    rows = BlockRows(stored, 512, form)
    assert torch.equal(rows.dequantised(), plain(stored, form))
    assert torch.equal(rows[1:3].dequantised(), plain(stored, form)[1:3])
    assert torch.equal(rows.take(torch.tensor([4, 0])).dequantised(), plain(stored, form)[[4, 0]])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize(("step", "with_library"), [(32, True), (96, True), (32, False), (96, False)])
def test_a_regrouped_down_projection_stands_for_the_same_numbers_bit_for_bit(
    form: BlockFormat, step: int, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(blocks_cpu, "native", lambda name: Native(library=None, problem="no compiler"))
    stored = stored_rows(96, 512, form)
    rows, expected = neurons_of(stored, 512, form, step), plain(stored, form).t()
    assert rows.numbers.tolist() == list(range(512))
    assert torch.equal(rows.dequantised(), expected)
    assert torch.equal(rows[100:300].dequantised(), expected[100:300])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_neurons_in_any_order_find_their_factors(form: BlockFormat) -> None:
    stored = stored_rows(64, 512, form)
    rows, ids = neurons_of(stored, 512, form), torch.tensor([300, 17, 18, 511, 0, 299, 48])
    some = NeuronRows(rows.numbers[ids], rows.codes[ids], rows.table, 64, form)
    assert torch.equal(some.dequantised(), plain(stored, form).t()[ids])


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_neuron_that_the_table_does_not_have_is_the_first(form: BlockFormat) -> None:
    whole = neurons_of(stored_rows(64, 512, form), 512, form)
    said = torch.tensor([511, 512, -1, 1 << 30, -(1 << 31), (1 << 31) - 1], dtype=torch.int32)
    meant = NeuronRows(torch.where(said == 511, said, 0), whole.codes[:6], whole.table, 64, form)
    numbers, codes = records_of(said, whole.codes[:6])
    some, z = NeuronRows(numbers, codes, whole.table, 64, form), torch.randn(3, 6)
    assert torch.equal(some.dequantised(), meant.dequantised())
    assert_near(block_weights(some), meant.dequantised(), 1e-6)
    assert_near(block_down(z, some), z @ meant.dequantised())


@pytest.mark.parametrize("with_library", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_products_are_those_of_the_weights_with_a_compiler_and_without(
    form: BlockFormat, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_library:
        monkeypatch.setattr(blocks_cpu, "native", lambda name: Native(library=None, problem="no compiler"))
    stored, down = stored_rows(37, 768, form), stored_rows(608, 512, form)
    rows, neurons = BlockRows(stored, 768, form), neurons_of(down, 512, form)
    generator = torch.Generator().manual_seed(1)
    for num_tokens in (1, 2, 7, 16, 61, 64, 70):
        x, z = torch.randn(num_tokens, 768, generator=generator), torch.randn(num_tokens, 512, generator=generator)
        assert_near(block_linear(x, rows), x @ plain(stored, form).t())
        assert_near(block_down(z, neurons), z @ plain(down, form).t())
        assert_near(block_down(z[:, 11:49], neurons[11:49]), z[:, 11:49] @ plain(down, form).t()[11:49])
    assert_near(linear_reference(x.bfloat16(), rows), x.bfloat16().float() @ plain(stored, form).t())
    assert_near(down_reference(z, neurons), z @ plain(down, form).t())
    assert_near(block_weights(rows), plain(stored, form), 1e-6)
    assert_near(block_weights(neurons), plain(down, form).t(), 1e-6)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_token_gives_the_same_bits_beside_others(form: BlockFormat) -> None:
    rows, neurons = BlockRows(stored_rows(9, 768, form), 768, form), neurons_of(stored_rows(64, 256, form), 256, form)
    x, z = torch.randn(9, 768), torch.randn(9, 256)
    alone = torch.cat([block_linear(each[None], rows) for each in x])
    assert torch.equal(block_linear(x, rows), alone)
    assert torch.equal(block_down(z, neurons), torch.cat([block_down(each[None], neurons) for each in z]))


@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS + 1])
def test_a_layer_multiplies_with_blocks_as_with_any_matrix(num_tokens: int) -> None:
    form = BLOCK_FORMATS["Q4_K"]
    stored, down = stored_rows(37, 256, form), stored_rows(64, 256, form)
    x, bias = torch.randn(num_tokens, 256), torch.randn(37)
    assert_near(project(x, BlockRows(stored, 256, form), bias), x @ plain(stored, form).t() + bias)
    assert_near(combine(x, neurons_of(down, 256, form)), x @ plain(down, form).t())
    stack = (BlockRows(stored, 256, form), torch.randn(3, 256))
    assert_near(project(x, stack), torch.cat((x @ plain(stored, form).t(), x @ stack[1].t()), dim=1))


def assert_gpu_weights_are_the_references(device: str) -> None:
    from offload_sirius.kernels import blocks_gpu

    for form in FORMATS:
        rows = BlockRows(stored_rows(3, 1280, form).to(device), 1280, form)
        assert_near(blocks_gpu.weights(rows, torch.float32).cpu(), rows.dequantised().cpu(), 1e-6)
        whole = neurons_of(stored_rows(64, 512, form), 512, form)
        ids, behind = torch.tensor([300, 17, 18, 511, 0, 299, 48]), torch.tensor([512, -1, (1 << 31) - 1], dtype=torch.int32)
        strange = NeuronRows(behind.to(device), whole.codes[:3].to(device), whole.table.to(device), 64, form)
        assert_near(blocks_gpu.weights(strange, torch.float32).cpu(), strange.dequantised().cpu(), 1e-6)
        some = NeuronRows(whole.numbers[ids].to(device), whole.codes[ids].to(device), whole.table.to(device), 64, form)
        assert_near(blocks_gpu.weights(some, torch.float32).cpu(), whole.dequantised()[ids], 1e-6)
        assert_near(blocks_gpu.weights(some, torch.bfloat16).float().cpu(), whole.dequantised()[ids], 1e-2)


@needs_triton
def test_the_kernels_in_the_interpreter_give_what_the_references_do() -> None:
    program = (
        "import importlib.util, torch\n"
        f"spec = importlib.util.spec_from_file_location('cases', {__file__!r})\n"
        "cases = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "cases.assert_gpu_weights_are_the_references('cpu')\n"
        "print('same')\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


@needs_triton
@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "Q4_K", "Q6_K"])
def test_the_kernels_compile_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton

    from offload_sirius.kernels import blocks_gpu

    constants = blocks_gpu._constants(BLOCK_FORMATS[name])
    types = {"numbers": "*i32", "rows": "*u8", "codes": "*u8", "table": "*u8", "out": "*bf16"}
    kernels: tuple[Any, ...] = (blocks_gpu._decode_rows, blocks_gpu._decode_neurons)
    for kernel in kernels:
        signature = {each: "constexpr" if each in constants else types.get(each, "i32") for each in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 80, 32))
        assert "st.global" in compiled.asm["ptx"]


@pytest.mark.gpu
@needs_triton
def test_products_on_a_gpu_are_the_references() -> None:
    assert_gpu_weights_are_the_references("cuda")
    for form in FORMATS:
        stored, x = stored_rows(37, 768, form), torch.randn(7, 768)
        rows = BlockRows(stored.cuda(), 768, form)
        assert_near(block_linear(x.cuda(), rows).cpu(), x @ plain(stored, form).t(), 2e-5)
