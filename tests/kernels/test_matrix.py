"""Where a layer meets its matrices: plain or quantised, few tokens or many, the same products."""

from __future__ import annotations

import pytest
import torch

from offload_sirius.kernels.matrix import combine, project
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.model.costs import unpacking_nbytes
from offload_sirius.quantization import FEW_TOKENS, UNPACKED_ROWS, WeightFormat
from offload_sirius.weights.quant import quantise_rows
from offload_sirius_loaders import open_checkpoint

FORMATS = [WeightFormat(kind="int8", group=64), WeightFormat(kind="int4", group=32), WeightFormat(kind="int4", group=128)]


def matrix(form: WeightFormat, num_rows: int, width: int) -> QuantizedRows:
    weights = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(3))
    return QuantizedRows(quantise_rows(weights, form), width, form)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 7, FEW_TOKENS, FEW_TOKENS + 1, 300])
@pytest.mark.parametrize("num_rows", [1, 96, UNPACKED_ROWS + 5])
def test_products_are_those_of_the_numbers_that_the_rows_stand_for(form: WeightFormat, num_tokens: int, num_rows: int) -> None:
    rows = matrix(form, num_rows, 72)
    plain, x, z, bias = rows.dequantised(), torch.randn(num_tokens, 72), torch.randn(num_tokens, num_rows), torch.randn(num_rows)
    assert torch.allclose(project(x, rows), project(x, plain), atol=1e-3, rtol=1e-4)
    assert torch.allclose(project(x, rows, bias), project(x, plain, bias), atol=1e-3, rtol=1e-4)
    assert torch.allclose(combine(z, rows), combine(z, plain), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("num_tokens", [1, FEW_TOKENS + 1])
def test_a_matrix_without_rows_gives_nothing(num_tokens: int) -> None:
    rows = matrix(FORMATS[1], 1, 64)[:0]
    assert project(torch.ones(num_tokens, 64), rows).shape == (num_tokens, 0)
    assert torch.equal(combine(torch.ones(num_tokens, 0), rows), torch.zeros(num_tokens, 64))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unpacking_takes_no_more_than_is_planned_for(form: WeightFormat, dtype: torch.dtype) -> None:
    spec = open_checkpoint("synthetic:tiny?width=512&heads=8&kv_heads=8").spec
    rows = matrix(form, UNPACKED_ROWS, 512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rows.dequantised().to(dtype)
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert 0 < peak <= unpacking_nbytes(spec, dtype.itemsize, 0)
