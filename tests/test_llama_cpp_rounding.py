"""Activations rounded as llama.cpp rounds them, which tools/llama_cpp_ids.py compares with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from offload_sirius.blocks import BLOCK_FORMATS
from offload_sirius.kernels.block_products import write_outputs
from offload_sirius.kernels.blocks import BlockRows, NeuronRows
from offload_sirius.kernels.matrix import combine, project


@pytest.fixture(scope="module")
def rounding() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[1] / "tools")
    sys.path.insert(0, folder)
    import llama_cpp_rounding

    yield llama_cpp_rounding
    sys.path.remove(folder)


def test_the_largest_of_32_becomes_127_steps_of_a_float16_and_halves_become_even(rounding: ModuleType) -> None:
    x = torch.zeros(1, 96)
    x[0, :5] = torch.tensor([127, 0.5, 1.5, -2.5, -127])
    x[0, 64:66] = torch.tensor([1.0, -0.5])
    values, rests = rounding.rounded(x)
    step = 1032 / 2**17  # the float16 next to 1 / 127
    assert values[0, :5].tolist() == [127, 0, 2, -2, -127]
    assert values[0, 64:66].tolist() == [127 * step, -64 * step]
    assert values.count_nonzero() == 6
    # 63 / 127 is 0.49606 as a float16, and 63 steps are 0.49603.
    assert rests.tolist() == [[0, 0, 0.49609375 - 63 * step]]


def test_products_are_those_of_integers_and_minima_meet_sums(rounding: ModuleType) -> None:
    form, generator = BLOCK_FORMATS["Q4_1"], np.random.default_rng(0)
    stored = generator.integers(0, 256, (64, 4, form.block_nbytes), np.uint8)  # 64 rows of 128
    halves = generator.uniform(-0.1, 0.1, (64, 4, 2)).astype(np.float16)
    stored[..., :4] = halves.view(np.uint8)
    codes = np.concatenate((stored[..., 4:] & 15, stored[..., 4:] >> 4), axis=2).astype(np.float64)
    x = generator.normal(size=(40, 4, 32)).astype(np.float32)
    largest = np.abs(x).max(axis=2, keepdims=True)
    integers = np.rint(x * (np.float32(127) / largest)).astype(np.float64)
    step = largest / np.float32(127)
    sums = (step[..., 0] * integers.sum(axis=2).astype(np.float32)).astype(np.float16).astype(np.float64)
    products = np.einsum("sbk,nbk->snb", integers, codes) * step[..., 0].astype(np.float16).astype(np.float64)[:, None]
    expected = (products * halves[..., 0]).sum(axis=2) + np.einsum("sb,nb->sn", sums, halves[..., 1].astype(np.float64))

    bytes_of_rows = torch.from_numpy(stored.reshape(64, -1))
    records = torch.empty(128, 4 + form.column_nbytes(64), dtype=torch.uint8)
    table = torch.empty(form.table_shape(128, 64), dtype=torch.uint8)
    neurons = NeuronRows(records[:, :4].view(torch.int32)[:, 0], records[:, 4:], table, 64, form)
    write_outputs(neurons, 0, bytes_of_rows)
    tokens = torch.from_numpy(x.reshape(40, 128))
    with rounding.rounded_activations():
        projected, combined = project(tokens, BlockRows(bytes_of_rows, 128, form)), combine(tokens, neurons)
    assert np.allclose(projected.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.allclose(combined.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    plain = project(tokens, BlockRows(bytes_of_rows, 128, form))
    assert not np.allclose(plain.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
