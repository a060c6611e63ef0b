"""What a model is, apart from its weights: shapes, positions, end tokens. Knows no file format and no tensor library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal[
    "embedding",
    "final_norm",
    "head",
    "input_norm",
    "q",
    "k",
    "v",
    "o",
    "q_bias",
    "k_bias",
    "v_bias",
    "o_bias",
    "q_norm",
    "k_norm",
    "post_norm",
    "gate",
    "up",
    "down",
]
"""The part a tensor plays. The first three exist once a model, the rest once a layer."""

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding of a model, in the terms of the `rope_scaling` entry of config.json."""

    kind: RopeKind = "default"
    theta: float = 10000.0
    parameters: Mapping[str, float | bool] = field(default_factory=dict)
    """Everything else of `rope_scaling`, as numbers: factor, low_freq_factor, beta_fast, mscale, ..."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shape of a decoder-only transformer with a gated feed-forward block. Letters are those of model/ops.py."""

    name: str
    """What people call it: an alias, a hub id, or the name of its folder or file."""
    architecture: str
    """llama, mistral, qwen2 or qwen3."""
    num_layers: int
    """L"""
    width: int
    """D, also called hidden_size."""
    num_heads: int
    """H"""
    num_kv_heads: int
    """K"""
    head_dim: int
    """E"""
    ffn_width: int
    """F, neurons of a layer, also called intermediate_size."""
    vocab_size: int
    """V"""
    max_positions: int
    """Longest sequence, prompt and answer together, with RoPE scaling counted in."""
    norm_eps: float
    rope: RopeSpec
    activation: str = "silu"
    """Name in the transformers ACT2FN table."""
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    """The head is the embedding table."""
    layer_windows: tuple[int | None, ...] = ()
    """Sliding attention window of each layer, None where attention is full. Always num_layers long."""
    stored_dtype: str = "BF16"
    """Storage type of most weights: F32, F16, BF16 or a GGUF type such as Q4_1."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Every id that ends a text, from generation_config.json and config.json."""

    def layer_roles(self) -> dict[Role, tuple[int, ...]]:
        """Role -> shape of the tensors of one layer; matrices are [out, in]."""
        width, head_dim = self.width, self.head_dim
        q_rows, kv_rows = self.num_heads * head_dim, self.num_kv_heads * head_dim
        roles: dict[Role, tuple[int, ...]] = {
            "input_norm": (width,),
            "q": (q_rows, width),
            "k": (kv_rows, width),
            "v": (kv_rows, width),
        }
        if self.qkv_bias:
            roles |= {"q_bias": (q_rows,), "k_bias": (kv_rows,), "v_bias": (kv_rows,)}
        if self.qk_norm:
            roles |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}
        roles["o"] = (width, q_rows)
        if self.output_bias:
            roles["o_bias"] = (width,)
        roles["post_norm"] = (width,)
        roles |= {"gate": (self.ffn_width, width), "up": (self.ffn_width, width), "down": (width, self.ffn_width)}
        return roles

    def model_roles(self) -> dict[Role, tuple[int, ...]]:
        """Role -> shape of the tensors that exist once a model; the head is absent where it is tied."""
        roles: dict[Role, tuple[int, ...]] = {
            "embedding": (self.vocab_size, self.width),
            "final_norm": (self.width,),
        }
        if not self.tied_head:
            roles["head"] = (self.vocab_size, self.width)
        return roles
