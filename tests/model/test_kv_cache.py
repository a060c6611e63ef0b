from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius.errors import PromptError
from offload_sirius.model.costs import kv_cache_nbytes
from offload_sirius.model.kv_cache import KVCache
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

SPEC = ModelSpec(
    name="test",
    architecture="llama",
    num_layers=2,
    width=12,
    num_heads=6,
    num_kv_heads=3,
    head_dim=2,
    ffn_width=8,
    vocab_size=16,
    max_positions=64,
    norm_eps=1e-5,
    rope=RopeSpec(),
    layer_windows=(None, None),
)
CAPACITY = 12


def entries(first: float, num_tokens: int) -> torch.Tensor:
    """[B, K, S, E], in which token i holds the number first + i."""
    numbers = first + torch.arange(num_tokens, dtype=torch.float32)
    return numbers.view(1, 1, -1, 1).expand(1, SPEC.num_kv_heads, -1, SPEC.head_dim)


def append(cache: KVCache, first: float, num_tokens: int) -> None:
    """A pass: all layers write the same positions, then the cache advances. Values are keys + 1000, layer 1 is layer 0 + 100."""
    for layer in range(SPEC.num_layers):
        keys = entries(first + 100 * layer, num_tokens)
        cache.write(layer, cache.length, keys, keys + 1000)
    cache.advance(num_tokens)


def assert_holds(cache: KVCache, expected: list[int]) -> None:
    """These numbers, in this order, in every layer."""
    assert cache.length == len(expected)
    for layer in range(SPEC.num_layers):
        keys, values = cache.read(layer, 0, cache.length)
        numbers = torch.tensor(expected, dtype=torch.float32).view(1, 1, -1, 1).expand(keys.shape) + 100 * layer
        assert torch.equal(keys, numbers)
        assert torch.equal(values, numbers + 1000)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["append", "truncate", "keep"]), max_size=12), st.data())
def test_appends_truncations_and_branches_kept_in_any_order_act_as_on_a_list(actions: list[str], data: st.DataObject) -> None:
    cache, expected, next_number = KVCache(SPEC, CAPACITY, dtype=torch.float32), list[int](), 0
    for action in actions:
        if action == "append":
            count = data.draw(st.integers(0, CAPACITY - len(expected)))
            append(cache, next_number, count)
            expected += range(next_number, next_number + count)
            next_number = (next_number + count) % 88
            continue
        length = data.draw(st.integers(0, len(expected)))
        if action == "truncate":
            cache.truncate(length)
            expected = expected[:length]
        else:
            behind = range(len(expected) - length)
            offsets = sorted(data.draw(st.sets(st.sampled_from(behind)))) if behind else []
            cache.keep(length, offsets)
            expected = expected[:length] + [expected[length + offset] for offset in offsets]
        assert_holds(cache, expected)
    assert_holds(cache, expected)


@pytest.mark.parametrize(
    ("length", "offsets", "left"),
    [
        (3, [], [0, 1, 2]),
        (3, [0, 1], [0, 1, 2, 3, 4]),
        (3, [0, 2, 3], [0, 1, 2, 3, 5, 6]),
        (0, [7], [7]),
        (2, [1, 2, 3, 4, 5], [0, 1, 3, 4, 5, 6, 7]),  # places overlap
        (8, [], [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_a_branch_is_kept_behind_what_was_there_before(length: int, offsets: list[int], left: list[int]) -> None:
    cache = KVCache(SPEC, CAPACITY, dtype=torch.float32)
    append(cache, 0, 8)
    cache.keep(length, offsets)
    assert_holds(cache, left)


@pytest.mark.parametrize(("length", "offsets"), [(9, []), (3, [5]), (0, [0, 8])])
def test_what_is_not_there_cannot_be_kept(length: int, offsets: list[int]) -> None:
    cache = KVCache(SPEC, CAPACITY, dtype=torch.float32)
    append(cache, 0, 8)
    with pytest.raises(AssertionError):
        cache.keep(length, offsets)


def test_writing_does_not_make_the_cache_longer_until_the_pass_advances_it() -> None:
    cache = KVCache(SPEC, CAPACITY, dtype=torch.float32)

    cache.write(0, 0, entries(7, 3), entries(8, 3))
    assert cache.length == 0

    cache.advance(3)
    assert cache.length == 3


def test_writing_at_a_position_of_the_device_is_writing_there() -> None:
    told, numbered = (KVCache(SPEC, 8, dtype=torch.float32) for _ in range(2))
    told.write(1, 5, entries(3.0, 2), -entries(3.0, 2))
    numbered.write_at(1, torch.tensor([5, 6]), entries(3.0, 2), -entries(3.0, 2))
    assert torch.equal(numbered.keys, told.keys)
    assert torch.equal(numbered.values, told.values)


def test_reading_from_the_middle_gives_those_positions_as_views() -> None:
    cache = KVCache(SPEC, CAPACITY, dtype=torch.float32)
    append(cache, 0, 8)

    keys, values = cache.read(1, 5, 8)

    assert keys[0, 0, :, 0].tolist() == [105, 106, 107]
    assert values[0, 0, :, 0].tolist() == [1105, 1106, 1107]
    assert keys.untyped_storage().data_ptr() == cache.keys.untyped_storage().data_ptr()


@pytest.mark.parametrize(("dtype", "element_nbytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_bill_is_what_the_tensors_weigh(dtype: torch.dtype, element_nbytes: int, batch: int) -> None:
    cache = KVCache(SPEC, CAPACITY, dtype=dtype, batch=batch)

    assert cache.nbytes == kv_cache_nbytes(SPEC, batch, CAPACITY, element_nbytes)


def test_the_bill_of_llama_3_8b_is_128_kib_a_position() -> None:
    spec = ModelSpec(
        name="llama-3-8b",
        architecture="llama",
        num_layers=32,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        ffn_width=14336,
        vocab_size=128256,
        max_positions=8192,
        norm_eps=1e-5,
        rope=RopeSpec(theta=500000.0),
        layer_windows=(None,) * 32,
    )

    assert kv_cache_nbytes(spec, 1, 1, 2) == 131072


def test_a_context_that_does_not_fit_is_refused_with_the_largest_that_does() -> None:
    cache = KVCache(SPEC, CAPACITY, dtype=torch.float32)
    append(cache, 0, 10)
    cache.require_room(2)

    with pytest.raises(PromptError) as raised:
        cache.require_room(3)

    assert str(raised.value) == (
        "the context needs 13 positions, the KV cache has room for 12; shorten the prompt or the answer, or raise --max-context"
    )


def test_a_beginning_is_taken_from_another_cache_and_nothing_else_stays() -> None:
    own, other = (KVCache(SPEC, CAPACITY, dtype=torch.float32) for _ in range(2))
    append(own, 50, 9)
    append(other, 0, 7)
    own.take(other, 4)
    append(own, 20, 2)
    assert_holds(own, [0, 1, 2, 3, 20, 21])
    assert_holds(other, [0, 1, 2, 3, 4, 5, 6])
