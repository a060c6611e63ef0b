"""Synthetic weights: shapes with published sizes, values that depend on their place only, and what is refused."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.synthetic import POOL_SIZE, SHAPES, open_synthetic

NO_BYTES = np.empty(0, np.uint8)


def as_float32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """bfloat16 in uint16 to float32; other types as they are."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values.astype(np.float32)


def rows(checkpoint: Checkpoint, first_row: int, num_rows: int) -> np.ndarray[Any, Any]:
    return checkpoint.decode(checkpoint.tensors[None, "embedding"], NO_BYTES, first_row, num_rows)


@pytest.mark.parametrize(
    ("shape", "num_parameters"),
    [
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-8b", 8_030_261_248),
        ("llama-2-13b", 13_015_864_320),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_a_shape_has_as_many_parameters_as_the_published_model(shape: str, num_parameters: int) -> None:
    checkpoint = open_synthetic(f"synthetic:{shape}")
    assert sum(math.prod(info.shape) for info in checkpoint.tensors.values()) == num_parameters
    assert sum(info.nbytes for info in checkpoint.tensors.values()) == 2 * num_parameters


@pytest.mark.parametrize("shape", SHAPES)
def test_a_synthetic_model_has_no_file_and_no_end_of_text(shape: str) -> None:
    checkpoint = open_synthetic(f"synthetic:{shape}")
    assert checkpoint.path is None
    assert all(info.file is None for info in checkpoint.tensors.values())
    assert checkpoint.spec.eos_token_ids == ()
    assert checkpoint.spec.name == f"synthetic:{shape}"
    assert checkpoint.tokenizer.num_bytes_ids == checkpoint.spec.vocab_size


def test_parameters_change_the_shape() -> None:
    name = "synthetic:tiny?layers=2&vocab=300&ffn=40&width=96&heads=6&kv_heads=3&positions=99&dtype=F16&seed=3"
    spec = open_synthetic(name).spec
    assert (spec.num_layers, spec.vocab_size, spec.ffn_width, spec.width) == (2, 300, 40, 96)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.max_positions) == (6, 3, 16, 99)
    assert (spec.stored_dtype, spec.name) == ("F16", name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huge", "shape 'huge' is not known; known are tiny, small, tinyllama-1.1b, llama-3.2-1b"),
        ("", "shape '' is not known"),
        ("tiny?depth=3", "parameter 'depth=3' is not known; write NAME=VALUE, known are layers, vocab, ffn, width,"),
        ("tiny?layers", "parameter 'layers' is not known;"),
        ("tiny?layers=2&layers=3", "parameter layers stands twice; give it once"),
        ("tiny?layers=0", "layers is 0; it must be a whole number between 1 and"),
        ("tiny?layers=-1", "layers is '-1';"),
        ("tiny?layers=1e9", "layers is '1e9';"),
        ("tiny?layers=" + "9" * 30, "layers is '9999"),
        ("tiny?layers=100000", "num_hidden_layers is 100000; it must be a whole number between 1 and 65536"),
        ("tiny?heads=3", "num_attention_heads is 3 and num_key_value_heads is 2; the first must be a multiple"),
        ("tiny?width=62", "hidden_size is 62 and num_attention_heads is 4; the first must be a multiple"),
        ("tiny?width=60", "head_dim is 15; rotary embedding needs an even number"),
        ("tiny?vocab=255", "vocab is 255; it must be at least 256, an id for every byte"),
        ("tiny?dtype=F64", "dtype is F64; it must be one of F32, F16, BF16"),
        ("tiny?seed=x", "seed is 'x'; it must be a whole number between 0 and"),
    ],
)
def test_what_makes_no_model_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_synthetic(f"synthetic:{name}")
    assert str(caught.value).startswith(f"synthetic:{name}: {message}")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_do_not_depend_on_how_rows_are_split(dtype: str) -> None:
    # 100,000 rows of 64: the pool of numbers is used up one and a half times.
    checkpoint = open_synthetic(f"synthetic:tiny?vocab=100000&dtype={dtype}")
    whole = checkpoint.read(None, "embedding")
    assert whole.size > POOL_SIZE
    parts = [rows(checkpoint, 0, 1), rows(checkpoint, 1, 69_998), rows(checkpoint, 69_999, 30_001)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_values_are_the_same_when_opened_again_and_others_with_another_seed() -> None:
    first, again = open_synthetic("synthetic:tiny"), open_synthetic("synthetic:tiny")
    other = open_synthetic("synthetic:tiny?seed=1")
    np.testing.assert_array_equal(first.read(1, "q"), again.read(1, "q"))
    assert not np.array_equal(first.read(1, "q"), other.read(1, "q"))
    assert not np.array_equal(first.read(1, "q"), first.read(2, "q"))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_matrices_are_normal_and_norms_are_one(dtype: str) -> None:
    checkpoint = open_synthetic(f"synthetic:small?dtype={dtype}")
    values = as_float32(checkpoint.read(0, "gate"))
    assert abs(values.mean()) < 1e-3
    assert values.std() == pytest.approx(0.02, rel=0.02)
    for layer, role in ((0, "input_norm"), (3, "post_norm"), (None, "final_norm")):
        norm = checkpoint.read(layer, role)  # type: ignore[arg-type]
        assert norm.shape == (256,)
        assert (as_float32(norm) == 1).all()


def test_bfloat16_values_are_the_float32_ones_rounded_to_nearest() -> None:
    exact = open_synthetic("synthetic:tiny?dtype=F32").read(0, "q")
    rounded = as_float32(open_synthetic("synthetic:tiny?dtype=BF16").read(0, "q"))
    assert (np.abs(rounded - exact) <= np.abs(exact) * 2.0**-8).all()


def test_threads_that_decode_at_once_get_the_same_values() -> None:
    checkpoint = open_synthetic("synthetic:tiny")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: checkpoint.read(0, "up"), range(8)))
    for values in results:
        np.testing.assert_array_equal(values, results[0])


def test_the_residual_stream_stays_far_from_overflow_through_80_layers() -> None:
    # Feed-forward blocks alone, which add the most: a crude pass with the norms that the weights assume.
    checkpoint = open_synthetic("synthetic:small?layers=80&dtype=F32")
    x = checkpoint.read(None, "embedding")[:4]
    for layer in range(80):
        normed = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5)
        gate, up = normed @ checkpoint.read(layer, "gate").T, normed @ checkpoint.read(layer, "up").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ checkpoint.read(layer, "down").T
    assert np.abs(x).max() < 100
