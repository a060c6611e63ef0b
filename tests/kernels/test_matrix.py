"""Where a layer meets its matrices: plain or quantised, few tokens or many, the same products."""

from __future__ import annotations

import pytest
import torch

from offload_sirius.kernels import cpu
from offload_sirius.kernels.matrix import combine, gated, project
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


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_gating_in_one_go_is_gating_step_by_step(form: WeightFormat, num_tokens: int) -> None:
    gate, up, x = matrix(form, 96, 72), matrix(form, 96, 72)[32:], torch.randn(num_tokens, 72)
    z = gated(x, gate[:64], up, "silu")
    assert z is not None
    assert torch.allclose(z, torch.nn.functional.silu(project(x, gate[:64])) * project(x, up), atol=1e-3, rtol=1e-4)
    assert gated(torch.randn(FEW_TOKENS + 1, 72), gate[:64], up, "silu") is None, "many tokens have a faster way"


@pytest.mark.skipif(cpu.tiles() is None, reason="this CPU does not multiply matrices")
def test_of_plain_bfloat16_a_token_gives_the_same_bits_alone_and_in_a_window() -> None:
    gate, up = (torch.randn(96, 3, 80, generator=torch.Generator().manual_seed(5)).bfloat16()[:, part] for part in (0, 1))
    x = torch.randn(FEW_TOKENS, 80).bfloat16()
    z = gated(x, gate, up, "silu")
    assert z is not None
    assert z.dtype == torch.bfloat16
    expected = torch.nn.functional.silu(x.float() @ gate.float().t()) * (x.float() @ up.float().t())
    assert torch.allclose(z.float(), expected, atol=1e-2, rtol=1e-2)
    assert torch.allclose(combine(z, up).float(), z.float() @ up.float(), atol=0.5, rtol=1e-2)
    for count in (1, 2, 16):
        assert torch.equal(project(x[:count], gate), project(x, gate)[:count])
        assert torch.equal(combine(z[:count], up), combine(z, up)[:count])
        alone = gated(x[:count], gate, up, "silu")
        assert alone is not None
        assert torch.equal(alone, z[:count])


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
