"""Keys and values in 8 bits: what is written comes back nearly, and attention over ranges is attention over all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius.model import ops
from offload_sirius.model.costs import activation_nbytes, quantized_attention_nbytes, quantized_kv_cache_nbytes
from offload_sirius.model.dense import DenseSource
from offload_sirius.model.kv_int8 import QuantizedKVCache
from offload_sirius.model.kv_rows import quantised
from offload_sirius.model.ops import added_mask, grouped_attention
from offload_sirius.model.transformer import Transformer

from .test_kv_cache import CAPACITY, SPEC
from .test_transformer import WIDE, peak_allocated_nbytes, random_tensors, tokens


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(num_tokens: int, dtype: torch.dtype = torch.float32) -> QuantizedKVCache:
    cache = QuantizedKVCache(SPEC, CAPACITY, dtype=dtype)
    for layer in range(SPEC.num_layers):
        entries = normal(2, 1, SPEC.num_kv_heads, num_tokens, SPEC.head_dim, seed=layer).to(dtype)
        cache.write(layer, 0, *entries)
    cache.advance(num_tokens)
    return cache


@settings(max_examples=60)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8))
def test_a_number_is_off_by_half_a_step_of_its_row_at_most(row: list[float]) -> None:
    x = torch.tensor([row])
    integers, scale = quantised(x)
    step = float(scale)
    # Below the smallest normal number steps get coarser.
    smallest = torch.finfo(torch.float32).tiny
    assert (integers * scale - x).abs().max() <= step / 2 * (1 + 1e-4) + smallest
    assert step == pytest.approx(max(map(abs, row)) / 127, rel=1e-6, abs=smallest)


def test_zeros_stay_zeros() -> None:
    integers, scale = quantised(torch.zeros(2, 4))
    assert integers.tolist() == [[0] * 4] * 2
    assert scale.tolist() == [[0.0]] * 2


def test_a_token_is_written_the_same_with_others_and_alone_and_at_a_position_that_the_device_knows() -> None:
    together, alone, placed = (QuantizedKVCache(SPEC, CAPACITY, dtype=torch.float32) for _ in range(3))
    entries = normal(2, 1, SPEC.num_kv_heads, 5, SPEC.head_dim)
    together.write(1, 0, *entries)
    for place in range(5):
        token = entries[:, :, :, place : place + 1]
        alone.write(1, place, *token)
        placed.write_at(1, torch.tensor([place]), *token)
    for found in (alone, placed):
        assert all(torch.equal(*pair) for pair in zip(found.tensors, together.tensors, strict=True))


def test_kept_branches_take_their_scales_along() -> None:
    cache = filled(8)
    before = [rows.plain() for rows in cache.read(0, 0, 8)]
    cache.keep(3, [1, 4])
    for kept, all_of_it in zip(cache.read(0, 0, 5), before, strict=True):
        assert torch.equal(kept.plain(), all_of_it[:, :, [0, 1, 2, 4, 7]])


def test_a_beginning_that_another_cache_takes_comes_with_its_scales() -> None:
    cache, other = filled(8), QuantizedKVCache(SPEC, CAPACITY, dtype=torch.float32)
    other.take(cache, 5)
    assert other.length == 5
    for taken, own in zip(other.read(1, 0, 5), cache.read(1, 0, 5), strict=True):
        assert torch.equal(taken.plain(), own.plain())


def test_bytes_are_those_of_the_formula() -> None:
    assert filled(1).nbytes == quantized_kv_cache_nbytes(SPEC, 1, CAPACITY) == 2 * 2 * 3 * CAPACITY * (2 + 4)


MASKS: dict[str, Any] = {
    "none": lambda num_tokens, num_slots: None,
    "flags": lambda num_tokens, num_slots: torch.arange(num_slots) <= torch.arange(num_tokens)[:, None] + num_slots - num_tokens,
    "numbers": lambda num_tokens, num_slots: added_mask(MASKS["flags"](num_tokens, num_slots), torch.float32),
    "late": lambda num_tokens, num_slots: (torch.arange(num_slots) >= num_slots - 1).expand(num_tokens, -1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_attention_over_ranges_of_slots_is_attention_over_all(
    size: int, num_tokens: int, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "scored_slots", lambda _: size)
    cache, queries = filled(9), 3 * normal(1, num_tokens, SPEC.num_heads, SPEC.head_dim, seed=7)
    start, stop = 2, 9
    seen = MASKS[mask](num_tokens, stop - start)
    keys, values = cache.read(1, start, stop)
    expected = grouped_attention(queries, keys.plain(), values.plain(), seen)
    assert torch.allclose(grouped_attention(queries, keys, values, seen), expected, atol=1e-6)


def test_bfloat16_comes_back_as_bfloat16() -> None:
    cache = filled(4, torch.bfloat16)
    keys, values = cache.read(0, 0, 4)
    mixed = grouped_attention(normal(1, 1, SPEC.num_heads, SPEC.head_dim).to(torch.bfloat16), keys, values, None)
    assert mixed.dtype == keys.plain().dtype == cache.dtype == torch.bfloat16


@pytest.mark.parametrize(("num_before", "num_tokens"), [(0, 17), (0, 300), (1300, 1), (1300, 40)])
def test_the_bill_of_a_prompt_and_of_this_attention_is_at_least_what_a_pass_allocates(
    num_before: int, num_tokens: int, tmp_path: Path
) -> None:
    spec = replace(WIDE, num_layers=1, layer_windows=WIDE.layer_windows[:1])
    num_positions = num_before + num_tokens
    cache = QuantizedKVCache(spec, num_positions, dtype=torch.float32)
    transformer = Transformer(spec, DenseSource(spec, random_tensors(spec)), cache)
    cache.advance(num_before)
    peak_nbytes = peak_allocated_nbytes(lambda: transformer.prefill(tokens(num_tokens)), tmp_path / "trace.json")
    bill = quantized_attention_nbytes(spec, min(512, num_positions), num_positions)
    assert peak_nbytes <= activation_nbytes(spec, num_positions, 4) + bill


@pytest.mark.parametrize(("num_tokens", "num_slots"), [(1, 2000), (100, 1000), (512, 300), (1, 30)])
def test_the_bill_of_this_attention_is_no_less_than_what_it_allocates_and_less_than_thrice_it(
    num_tokens: int, num_slots: int, tmp_path: Path
) -> None:
    cache = QuantizedKVCache(WIDE, num_slots, dtype=torch.float32)
    queries = normal(1, num_tokens, WIDE.num_heads, WIDE.head_dim)
    peak_nbytes = peak_allocated_nbytes(
        lambda: grouped_attention(queries, *cache.read(0, 0, num_slots), None), tmp_path / "trace.json"
    )
    assert peak_nbytes <= quantized_attention_nbytes(WIDE, num_tokens, num_slots) <= 3 * peak_nbytes
