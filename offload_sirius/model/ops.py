"""The arithmetic of a layer on plain tensors. Knows no model, no cache, and no weights but those it is handed.

Shape letters, here and in every file of this room:

    B  sequences (always 1 yet)         D  model width                     F  feed-forward neurons of a layer
    S  tokens of this call              H  query heads                     N  neurons kept of them, F where all are
    C  tokens of one chunk of them      K  key and value heads             L  layers
    T  positions in the KV cache,       G  query heads sharing one, H / K  V  vocabulary
       those of this call included      E  width of a head
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius.errors import ConfigError
from offload_sirius.kernels import cpu
from offload_sirius.kernels.matrix import gated, project
from offload_sirius.model.costs import scored_slots
from offload_sirius.model.kv_rows import KVRows, QuantizedKVRows
from offload_sirius.model.source import NeuronWeights

Activation = Callable[[Tensor], Tensor]

NOTHING = -1e30
"""Below every score, and yet a number: what has seen nothing so far has weights of 0, not of no number."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""The common ones, so that only a rare model pays the second that importing transformers takes."""


_FUSED: dict[Activation, cpu.Activation] = {functional.silu: "silu", functional.gelu: "gelu", _gelu_tanh: "gelu_tanh"}
"""What the room of kernels calls those that it computes between two products."""


def activation_named(name: str) -> Activation:
    """The function of that name in the transformers ACT2FN table. Raises ConfigError where there is none."""
    if name in _ACTIVATIONS:
        return _ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ConfigError(f"activation {name!r} is not known to transformers; known are {', '.join(sorted(ACT2FN))}")
    function: Activation = ACT2FN[name]
    return function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] over its root mean square, times weight [D].

    The numerics of the reference models: float32 inside, rounded to the dtype of x, and only then weighted. (Handing the
    weight to functional.rms_norm would round once less, and differ in bfloat16.)
    """
    return functional.rms_norm(x, weight.shape, eps=eps).mul_(weight)


def gated_activations(x: Tensor, neurons: NeuronWeights, activation: Activation) -> Tensor:
    """What each neuron says of each token: z = activation(x gate^T) * (x up^T). [S, D] -> [S, N]"""
    if name := _FUSED.get(activation):
        z = gated(x, neurons.gate, neurons.up, name)
        if z is not None:
            return z
    return activation(project(x, neurons.gate)).mul_(project(x, neurons.up))


def causal_mask(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """bool [S, T], true where the key at position [T] is not after the query at position [S]."""
    return key_positions <= query_positions[:, None]


def window_mask(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """bool [S, T], true where the key is among the last `window` positions up to and including the query's own."""
    return key_positions > query_positions[:, None] - window


def added_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added to scores: 0 where the key is seen, minus infinity where not."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def grouped_attention(queries: Tensor, keys: KVRows, values: KVRows, mask: Tensor | None) -> Tensor:
    """Attention where G query heads share a key and value head.

    mask: [S, T], bool, true is seen, or numbers as of `added_mask`; None sees everything.

    queries [B, S, H, E], keys and values [B, K, T, E] -> [S, HE] (B = 1)

    The G heads of a group become further rows of one query matrix. Then both sides have K heads, no backend has to know about
    groups, and a single token still is a matrix of G rows (measured on a CPU in bfloat16: up to 9 times faster than G vectors).
    """
    batch, num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    groups = queries.view(batch, num_tokens, num_kv_heads, -1, head_dim)  # [B, S, H, E] -> [B, S, K, G, E]
    rows = groups.transpose(1, 2).flatten(2, 3)  # -> [B, K, SG, E]
    if mask is not None and num_tokens > 1:  # that of a single token serves all heads of the group as it is
        mask = mask.repeat_interleave(num_heads // num_kv_heads, dim=0)  # [S, T] -> [SG, T]
    if isinstance(keys, QuantizedKVRows):
        assert isinstance(values, QuantizedKVRows), "keys and values are held alike"
        mixed = ranged_attention(rows, keys, values, mask, num_slots=scored_slots(num_tokens * num_heads))
    else:
        assert isinstance(values, Tensor), "keys and values are held alike"
        mixed = functional.scaled_dot_product_attention(rows, keys, values, attn_mask=mask)
    groups = mixed.view(batch, num_kv_heads, num_tokens, -1, head_dim).transpose(1, 2)  # -> [B, S, K, G, E]
    return groups.reshape(num_tokens, num_heads * head_dim)  # -> [S, HE]


def ranged_attention(
    rows: Tensor, keys: QuantizedKVRows, values: QuantizedKVRows, mask: Tensor | None, *, num_slots: int
) -> Tensor:
    """Attention that looks at a few slots at a time, so that no more than these are ever dequantised.

    Kept from range to range are the largest score, the sum of the weights and the mix of the values so far (Milakov and
    Gimelshein, arXiv 1805.02867).

    rows [B, K, R, E], keys and values [B, K, T, E], mask [R, T] or [1, T] -> [B, K, R, E]
    """
    rows = rows * rows.shape[-1] ** -0.5
    largest = torch.full((*rows.shape[:-1], 1), NOTHING, dtype=torch.float32, device=rows.device)  # [B, K, R, 1]
    total = torch.zeros_like(largest)
    mixed = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)  # [B, K, R, E]
    for start in range(0, keys.shape[2], num_slots):
        length = min(num_slots, keys.shape[2] - start)
        scores = torch.matmul(rows, keys.narrow(start, length).plain().mT).float()  # [B, K, R, E] x [B, K, E, C] -> [B, K, R, C]
        if mask is not None:
            _hide(scores, mask.narrow(1, start, length))
        above = torch.maximum(largest, scores.amax(dim=-1, keepdim=True))
        weights, fade = scores.sub_(above).exp_(), largest.sub_(above).exp_()
        total.mul_(fade).add_(weights.sum(dim=-1, keepdim=True))
        # [B, K, R, C] x [B, K, C, E] -> [B, K, R, E]
        mixed.mul_(fade).add_(torch.matmul(weights.to(rows.dtype), values.narrow(start, length).plain()))
        largest = above
    return mixed.div_(total).to(rows.dtype)


def _hide(scores: Tensor, mask: Tensor) -> None:
    """Of scores [B, K, R, C] those that a mask [R, C] does not show: flags, or numbers as of `added_mask`."""
    if mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    else:
        scores.add_(mask)
