"""A step whose tensors have their places beforehand: the plain step's logits and cache, also when a recording of it is played."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.errors import PromptError
from offload_sirius.model.costs import extent_of, extents, fixed_step_nbytes
from offload_sirius.model.dense import DenseSource
from offload_sirius.model.fixed_step import FixedStep
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

from .recording import TapeRecorder
from .test_transformer import SPEC, random_tensors, tokens

CAPACITY = 40
PROMPT = 5
TOLERANCE = 1e-6

PLAIN = replace(SPEC, num_kv_heads=4, qkv_bias=False, output_bias=False, qk_norm=False, layer_windows=(None,) * 3)
SPECS = {
    "grouped heads, biases, head norms, a sliding window": SPEC,
    "as many key heads as query heads, nothing else": PLAIN,
    "windows only, of two widths": replace(SPEC, layer_windows=(3, 6, 3)),
    "rotation that depends on the prompt": replace(
        SPEC, max_positions=32, rope=RopeSpec(kind="dynamic", parameters={"factor": 2.0})
    ),
    "tied head": replace(SPEC, tied_head=True),
}


@pytest.fixture(autouse=True)
def small_extents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them: 8, 16, 32, 40."""
    monkeypatch.setattr("offload_sirius.model.costs.LEAST_EXTENT", 8)


def build(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> tuple[Transformer, FixedStep]:
    source = DenseSource(spec, random_tensors(spec, dtype))
    transformer = Transformer(spec, source, KVCache(spec, CAPACITY, dtype=dtype))
    return transformer, transformer.fixed_step(source)


def recorded(step: FixedStep) -> Callable[[Tensor], Tensor]:
    """The step, of which every extent is recorded once, and played at all positions."""
    recorder, plays = TapeRecorder(), dict[int, Callable[[], None]]()

    def compute(extent: int) -> None:
        if extent not in plays:
            plays[extent] = recorder.record(partial(step.compute, extent))
        plays[extent]()

    return lambda token_ids: step.step(token_ids, compute)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("play", [False, True], ids=["as it is", "recorded"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_logits_and_cache_are_those_of_the_plain_step_at_every_position(spec: ModelSpec, play: bool) -> None:
    plain, _ = build(spec)
    transformer, step = build(spec)
    token_ids = tokens(CAPACITY)
    take = recorded(step) if play else step.step
    for each in (plain, transformer):
        each.prefill(token_ids[:PROMPT])
    for token_id in token_ids[PROMPT:].split(1):
        assert_same(take(token_id), plain.step(token_id))
    assert transformer.cache.length == CAPACITY
    assert_same(transformer.cache.keys, plain.cache.keys)
    assert_same(transformer.cache.values, plain.cache.values)


def test_a_recording_goes_on_after_positions_were_taken_back_and_other_passes_came_between() -> None:
    plain, _ = build(SPEC)
    transformer, step = build(SPEC)
    take = recorded(step)
    for each in (plain, transformer):
        each.prefill(tokens(9))
    for length in (9, 12, 10):
        for each in (plain, transformer):
            each.cache.keep(length)
        for token_id in tokens(20)[:5].split(1):
            assert_same(take(token_id), plain.step(token_id))
        plain.cache.keep(length)
        transformer.cache.keep(length)
        assert_same(transformer.step(tokens(6)), plain.step(tokens(6)))


def test_what_others_left_in_the_slots_behind_the_token_does_not_count() -> None:
    clean, littered = build(SPEC), build(SPEC)
    littered[0].cache.keys.fill_(1e4)
    littered[0].cache.values.fill_(-1e4)
    for transformer, _ in (clean, littered):
        transformer.prefill(tokens(6))
    assert torch.equal(littered[1].step(tokens(1)).clone(), clean[1].step(tokens(1)))


def test_computing_it_again_changes_nothing() -> None:
    transformer, step = build(SPEC)
    transformer.prefill(tokens(6))

    def thrice(extent: int) -> None:
        for _ in range(3):
            step.compute(extent)

    once = step.step(tokens(1)).clone()
    transformer.cache.keep(6)
    assert torch.equal(step.step(tokens(1), thrice), once)


def test_in_bfloat16_it_is_as_near_as_rounding_lets_it() -> None:
    plain, _ = build(SPEC, torch.bfloat16)
    transformer, step = build(SPEC, torch.bfloat16)
    for each in (plain, transformer):
        each.prefill(tokens(9))
    assert (step.step(tokens(1)) - plain.step(tokens(1))).abs().max() <= 0.05


def test_a_token_for_which_there_is_no_room_is_refused_and_one_that_fails_leaves_the_cache_as_it_was() -> None:
    transformer, step = build(SPEC)
    transformer.prefill(tokens(CAPACITY - 1))

    def fail(extent: int) -> None:
        raise RuntimeError(f"not with {extent}")

    with pytest.raises(RuntimeError, match="not with 40"):
        step.step(tokens(1), fail)
    assert transformer.cache.length == CAPACITY - 1
    step.step(tokens(1))
    with pytest.raises(PromptError, match=r"^the context needs 41 positions, the KV cache has room for 40; "):
        step.step(tokens(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bill_of_what_goes_in_and_comes_out_is_what_it_weighs(dtype: torch.dtype) -> None:
    assert build(SPEC, dtype)[1].nbytes == fixed_step_nbytes(SPEC, dtype.itemsize)


@given(capacity=st.integers(1, 10_000), share=st.floats(0, 1, exclude_max=True))
def test_a_position_lies_in_its_extent_and_not_in_half_of_it(capacity: int, share: float) -> None:
    position = int(share * capacity)
    extent = extent_of(position, capacity)
    assert position < extent <= capacity
    assert extent <= max(8, 2 * position)
    assert extent in extents(capacity)
