"""The plainest WeightSource: every tensor in memory, nothing moves. What streaming is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius_loaders.checkpoint import Key
from offload_sirius_loaders.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class DenseAttention:
    """Attention block of one layer; shapes as in AttentionWeights."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor


@dataclass(frozen=True, kw_only=True)
class DenseNeurons:
    """All neurons of one layer; shapes as in NeuronWeights."""

    gate: Tensor
    up: Tensor
    down: Tensor


class DenseSource:
    """Weights from a mapping (layer, role) -> tensor: matrices [out, in] as in a checkpoint, all in one dtype on one device."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[Key, Tensor]) -> None:
        self._embedding = tensors[None, "embedding"]
        self._final_norm = tensors[None, "final_norm"]
        self._head = self._embedding if spec.tied_head else tensors[None, "head"]
        self._attention = [_attention(tensors, layer) for layer in range(spec.num_layers)]
        self._neurons = [_neurons(tensors, layer) for layer in range(spec.num_layers)]

    @property
    def final_norm(self) -> Tensor:
        """[D]"""
        return self._final_norm

    @property
    def head(self) -> Tensor:
        """[V, D]"""
        return self._head

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [S] in host memory -> [S, D] on the device."""
        return functional.embedding(token_ids.to(self._embedding.device), self._embedding)

    def attention(self, layer: int) -> DenseAttention:
        """The attention block of the layer."""
        return self._attention[layer]

    def neurons(self, layer: int) -> DenseNeurons:
        """The neurons of the layer."""
        return self._neurons[layer]

    def release(self, layer: int) -> None:
        """Nothing to give up: the weights stay."""


def _attention(tensors: Mapping[Key, Tensor], layer: int) -> DenseAttention:
    has_bias = (layer, "q_bias") in tensors
    return DenseAttention(
        input_norm=tensors[layer, "input_norm"],
        qkv=torch.cat([tensors[layer, "q"], tensors[layer, "k"], tensors[layer, "v"]]),
        qkv_bias=torch.cat([tensors[layer, "q_bias"], tensors[layer, "k_bias"], tensors[layer, "v_bias"]]) if has_bias else None,
        q_norm=tensors.get((layer, "q_norm")),
        k_norm=tensors.get((layer, "k_norm")),
        output=tensors[layer, "o"],
        output_bias=tensors.get((layer, "o_bias")),
        post_norm=tensors[layer, "post_norm"],
    )


def _neurons(tensors: Mapping[Key, Tensor], layer: int) -> DenseNeurons:
    # A neuron is a row everywhere, so the down projection [D, F] is turned: [F, D].
    return DenseNeurons(gate=tensors[layer, "gate"], up=tensors[layer, "up"], down=tensors[layer, "down"].t().contiguous())
