"""What the model needs of its weights, and nothing about where they come from.

A dict of tensors wrapped in a few lines satisfies these protocols, and so does the streamer; the model cannot tell them apart.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from offload_sirius.kernels.matrix import Matrix, Stack


class AttentionWeights(Protocol):
    """Attention block of one layer. All on the device: matrices plain or quantised, the rest in the compute dtype."""

    @property
    def input_norm(self) -> Tensor:
        """[D]"""

    @property
    def qkv(self) -> Stack:
        """[(H + 2K)E, D]: the rows of q, then k, then v."""

    @property
    def qkv_bias(self) -> Tensor | None:
        """[(H + 2K)E]"""

    @property
    def q_norm(self) -> Tensor | None:
        """[E]"""

    @property
    def k_norm(self) -> Tensor | None:
        """[E]"""

    @property
    def output(self) -> Matrix:
        """[D, HE]"""

    @property
    def output_bias(self) -> Tensor | None:
        """[D]"""

    @property
    def post_norm(self) -> Tensor:
        """[D]"""


class NeuronWeights(Protocol):
    """Feed-forward neurons of one layer; N = F where all are kept. Views may be strided."""

    @property
    def gate(self) -> Matrix:
        """[N, D]"""

    @property
    def up(self) -> Matrix:
        """[N, D]"""

    @property
    def down(self) -> Matrix:
        """[N, D]: row j is the column j of the down projection, so that a neuron is a row everywhere."""


class WeightSource(Protocol):
    """Weights of a whole model, asked for layer after layer: 0, 1, ..., L - 1 is one pass.

    In a pass, each layer is asked for by `attention`, then `neurons`, then given up by `release`; what the first two returned
    must not be used after that. Asking may block until the bytes have arrived (CPU) or make the current stream wait (CUDA).
    """

    @property
    def final_norm(self) -> Tensor:
        """[D]"""

    @property
    def head(self) -> Matrix:
        """[V, D]"""

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [S] in host memory -> [S, D] on the device; rows are gathered on the host."""

    def attention(self, layer: int) -> AttentionWeights:
        """The attention block of the layer; blocks until it is there."""

    def neurons(self, layer: int) -> NeuronWeights:
        """The neurons of the same layer; blocks until they are there."""

    def release(self, layer: int) -> None:
        """The layer's weights are not used any more in this pass."""
