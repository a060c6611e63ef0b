"""What a pass does with the neurons of each layer: the protocol, and the plain way, which is all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from offload_sirius.kernels.matrix import combine
from offload_sirius.model.ops import activation_named, gated_activations
from offload_sirius.model.source import NeuronWeights

Neurons = Callable[[Tensor], Tensor]
"""Normed hidden states [C, D] of a chunk -> what the neurons add to them, [C, D]."""


class FeedForward(Protocol):
    """The feed-forward block of every layer, opened and closed once a pass."""

    def open(self, layer: int) -> Neurons:
        """The layer's neurons, for each chunk of the pass; blocks until they are there."""

    def close(self, layer: int) -> None:
        """All chunks have been through the layer, which is still in its place."""


class NeuronSource(Protocol):
    """What the feed-forward block needs of a weight source."""

    def neurons(self, layer: int) -> NeuronWeights:
        """See WeightSource."""


class DenseFeedForward:
    """All neurons that the source hands out."""

    def __init__(self, source: NeuronSource, activation: str) -> None:
        """Raises ConfigError where the activation is unknown."""
        self._source = source
        self._activation = activation_named(activation)

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        neurons = self._source.neurons(layer)
        # [C, D] -> [C, N] -> [C, D]
        return lambda x: combine(gated_activations(x, neurons, self._activation), neurons.down)

    def close(self, layer: int) -> None:
        """See FeedForward."""
