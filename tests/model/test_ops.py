from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from offload_sirius.errors import ConfigError
from offload_sirius.model.dense import DenseNeurons
from offload_sirius.model.ops import (
    activation_named,
    added_mask,
    causal_mask,
    gated_activations,
    grouped_attention,
    rms_norm,
    window_mask,
)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_before_it_weights(dtype: torch.dtype) -> None:
    x, weight = normal(5, 48, dtype=dtype), normal(48, dtype=dtype)
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)

    assert (rms_norm(x, weight, 1e-5) - expected).abs().max() <= (1e-6 if dtype == torch.float32 else 0)


def test_rms_norm_leaves_its_input_alone() -> None:
    x = normal(3, 8)
    before = x.clone()

    rms_norm(x, normal(8), 1e-5)

    assert torch.equal(x, before)


def test_a_neuron_is_its_activated_gate_times_its_up() -> None:
    neurons = DenseNeurons(
        gate=torch.tensor([[1.0, 0.0], [0.0, -1.0]]), up=torch.tensor([[2.0, 0.0], [1.0, 1.0]]), down=normal(2, 2)
    )
    x = torch.tensor([[3.0, 1.0]])

    assert gated_activations(x, neurons, torch.relu).tolist() == [[3.0 * 6.0, 0.0]]


def test_rows_of_a_record_serve_as_neurons_without_a_copy() -> None:
    records, gate, x = normal(7, 2, 8), normal(7, 8), normal(3, 8)
    strided = DenseNeurons(gate=gate, up=records[:, 0], down=records[:, 1])
    packed = DenseNeurons(gate=gate, up=records[:, 0].contiguous(), down=records[:, 1].contiguous())

    difference = gated_activations(x, strided, torch.relu) - gated_activations(x, packed, torch.relu)

    assert difference.abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["silu", "swish", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_activations_are_those_of_transformers(name: str) -> None:
    x = normal(200)

    assert torch.equal(activation_named(name)(x), ACT2FN[name](x))


def test_unknown_activation_is_named_together_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^activation 'sillu' is not known to transformers; known are gelu, .*, tanh.*$"):
        activation_named("sillu")


def test_causal_mask_shows_a_chunk_what_came_before_and_itself() -> None:
    mask = causal_mask(torch.tensor([2, 3]), torch.arange(4))

    assert mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_window_counts_the_position_of_the_query() -> None:
    mask = window_mask(torch.tensor([2, 3]), torch.arange(4), window=2)

    assert mask.int().tolist() == [[0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_that_of_each_head_with_the_keys_of_its_group(num_kv_heads: int, num_tokens: int, masked: bool) -> None:
    num_heads, head_dim, num_positions = 6, 8, 9
    queries = normal(1, num_tokens, num_heads, head_dim)
    keys, values = normal(1, num_kv_heads, num_positions, head_dim), normal(1, num_kv_heads, num_positions, head_dim) + 1
    mask = causal_mask(torch.arange(num_positions - num_tokens, num_positions), torch.arange(num_positions)) if masked else None

    heads = []
    for head in range(num_heads):
        group = head // (num_heads // num_kv_heads)
        scores = queries[0, :, head] @ keys[0, group].T / head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        heads.append(scores.softmax(-1) @ values[0, group])
    expected = torch.cat(heads, dim=-1)  # [S, HE]

    assert (grouped_attention(queries, keys, values, mask) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_mask_of_numbers_is_the_mask_of_flags(num_tokens: int) -> None:
    queries, keys, values = normal(1, num_tokens, 6, 8), normal(1, 2, 7, 8), normal(1, 2, 7, 8)
    seen = causal_mask(torch.arange(3, 3 + num_tokens), torch.arange(7))
    found = grouped_attention(queries, keys, values, added_mask(seen, torch.float32))
    assert torch.allclose(found, grouped_attention(queries, keys, values, seen), atol=1e-6)
