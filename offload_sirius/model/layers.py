"""A pass through all layers, for tokens that stand anywhere in the cache. Knows no prompts and no steps.

Where the keys of some tokens go, and which keys they see, is what their rows say: neighbouring slots of a cache, or of several
caches (transformer.py), or a slot whose number is only known to the device (fixed_step.py). The arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from offload_sirius.kernels.matrix import project
from offload_sirius.model.feed_forward import FeedForward
from offload_sirius.model.ops import rms_norm
from offload_sirius.model.rope import Rotation, rotate
from offload_sirius.model.source import AttentionWeights, WeightSource
from offload_sirius_loaders.spec import ModelSpec


class Rows(Protocol):
    """Tokens that go through a layer together."""

    @property
    def hidden(self) -> Tensor:
        """[C, D]: their hidden states. Layers add to them in place."""

    @property
    def rotation(self) -> Rotation:
        """Of their positions."""

    def attend(self, layer: int, window: int | None, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Enter their keys and values into the cache, and mix the values of all slots that each of them sees -> [C, HE].

        queries [B, C, H, E], keys and values [B, C, K, E]. The window counts a token's own position; None: a token sees all
        before it.
        """


def run_layers(spec: ModelSpec, source: WeightSource, all_rows: Sequence[Rows], feed_forward: FeedForward) -> None:
    """Take all rows through every layer. A layer is asked for once; its neurons may arrive while attention computes."""
    for layer, window in enumerate(spec.layer_windows):
        attention = source.attention(layer)
        for rows in all_rows:
            _attend(spec, layer, window, attention, rows)
        neurons = feed_forward.open(layer)
        for rows in all_rows:
            normed = rms_norm(rows.hidden, attention.post_norm, spec.norm_eps)  # [C, D]
            rows.hidden.add_(neurons(normed))
        feed_forward.close(layer)
        source.release(layer)


def head_logits(spec: ModelSpec, source: WeightSource, hidden: Tensor) -> Tensor:
    """[S, D] -> float32 [S, V]"""
    return project(rms_norm(hidden, source.final_norm, spec.norm_eps), source.head).float()


def _attend(spec: ModelSpec, layer: int, window: int | None, weights: AttentionWeights, rows: Rows) -> None:
    """Attention block: the rows see the slots before them, and enter their own keys and values."""
    num_turned = spec.num_heads + spec.num_kv_heads
    normed = rms_norm(rows.hidden, weights.input_norm, spec.norm_eps)
    projected = project(normed, weights.qkv, weights.qkv_bias)  # [C, D] -> [C, (H + 2K)E]
    heads = projected.view(1, -1, num_turned + spec.num_kv_heads, spec.head_dim)  # -> [B, C, H + 2K, E]
    turning, values = heads.split_with_sizes((num_turned, spec.num_kv_heads), dim=2)
    _norm_heads(spec, turning, weights)
    # Queries and keys lie beside each other and turn alike: one rotation for both.
    queries, keys = rotate(turning, rows.rotation).split_with_sizes((spec.num_heads, spec.num_kv_heads), dim=2)
    mixed = rows.attend(layer, window, queries, keys, values)  # [B, C, H, E] -> [C, HE]
    rows.hidden.add_(project(mixed, weights.output, weights.output_bias))  # [C, HE] -> [C, D]


def _norm_heads(spec: ModelSpec, heads: Tensor, weights: AttentionWeights) -> None:
    """qwen3 norms each query and key head before it is turned: [B, C, H + K, E], in place."""
    if weights.q_norm is None or weights.k_norm is None:
        return
    queries, keys = heads.split_with_sizes((spec.num_heads, spec.num_kv_heads), dim=2)
    queries.copy_(rms_norm(queries, weights.q_norm, spec.norm_eps))
    keys.copy_(rms_norm(keys, weights.k_norm, spec.norm_eps))
