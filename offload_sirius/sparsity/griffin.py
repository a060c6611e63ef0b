"""Coarse sparsity: one set of neurons for a whole sequence, chosen by what they said of its prompt. GRIFFIN, arXiv 2404.01365.

While the full model reads the prompt, each neuron j of a layer is scored by how much it says beside the others, token by token,

    s_j = || [ z_tj / ||z_t|| ]_t ||        z_t = act(x_t gate^T) * (x_t up^T)

and the N with the largest scores are kept for all draft steps that follow. Of a prompt whose beginning was computed before, with
another text behind it, the scores of that text count as far as it is shared. Knows neither slots nor links: the source is told
which neurons are kept, and hands out those alone where it can.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.kernels.matrix import combine
from offload_sirius.model.feed_forward import Neurons
from offload_sirius.model.ops import Activation, activation_named, gated_activations
from offload_sirius.model.source import NeuronWeights
from offload_sirius_loaders.spec import ModelSpec


class KeepingSource(Protocol):
    """What coarse sparsity needs of a weight source."""

    def neurons(self, layer: int) -> NeuronWeights:
        """See WeightSource. In a draft step all neurons of the layer, or those that are kept, in order."""

    def keep(self, layer: int, neuron_ids: Tensor) -> None:
        """Keep these neurons, int64 [N] in host memory, sorted, of the layer that was last asked for."""


class Griffin:
    """The statistic, the sets, and the two feed-forward blocks that make and use them."""

    def __init__(
        self, spec: ModelSpec, source: KeepingSource, num_kept: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """num_kept: N of each layer, below F. Allocates what `sparsity_nbytes` says."""
        assert 0 < num_kept < spec.ffn_width, (num_kept, spec.ffn_width)
        self.num_kept = num_kept
        self.source = source
        self.activation = activation_named(spec.activation)
        self.squared_scores = torch.zeros(spec.num_layers, spec.ffn_width, device=device)  # [L, F]
        """s_j^2 of what was computed of the text so far."""
        self.memory = 0.0
        """What earlier scores count for when a prompt comes."""
        self.masks = torch.ones(spec.num_layers, spec.ffn_width, dtype=dtype, device=device)  # [L, F]
        """1 for neurons that are kept, 0 for others."""
        self.prefill = ObservingFeedForward(self)
        """Computes all neurons, and chooses those to keep."""
        self.draft = KeptFeedForward(self)
        """Computes those that are kept."""

    def remember(self, num_staying: int, num_heard: int) -> None:
        """A prompt comes. Of so many tokens that were heard so many stay, and count as before."""
        self.memory = num_staying / num_heard if num_heard else 0.0


class ObservingFeedForward:
    """All neurons, scored while they are computed."""

    def __init__(self, griffin: Griffin) -> None:
        self._griffin = griffin

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        griffin = self._griffin
        scores = remembered(griffin.squared_scores[layer], griffin.memory)
        return scored(griffin.source.neurons(layer), griffin.activation, scores)

    def close(self, layer: int) -> None:
        """See FeedForward. Waits for the device once."""
        griffin = self._griffin
        kept = largest(griffin.squared_scores[layer], griffin.num_kept)  # [N]
        griffin.masks[layer].zero_().index_fill_(0, kept, 1)
        griffin.source.keep(layer, kept.cpu())


class KeptFeedForward:
    """Kept neurons only. Where the source has all of them in one place, those that are not kept are silenced: what is resident
    needs no second place then, and costs no bytes of the link either way."""

    def __init__(self, griffin: Griffin) -> None:
        self._griffin = griffin

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        griffin, neurons = self._griffin, self._griffin.source.neurons(layer)
        mask = griffin.masks[layer] if len(neurons.gate) > griffin.num_kept else None

        def compute(x: Tensor) -> Tensor:
            z = gated_activations(x, neurons, griffin.activation)  # [C, D] -> [C, N]
            return combine(z if mask is None else z.mul_(mask), neurons.down)  # [C, N] -> [C, D]

        return compute

    def close(self, layer: int) -> None:
        """See FeedForward."""


def scored(neurons: NeuronWeights, activation: Activation, squared_scores: Tensor) -> Neurons:
    """All neurons of a layer; what they say of each chunk is added to s_j^2, float32 [F]."""

    def compute(x: Tensor) -> Tensor:
        z = gated_activations(x, neurons, activation)  # [C, D] -> [C, F]
        add_squared_scores(squared_scores, z)
        return combine(z, neurons.down)  # [C, F] -> [C, D]

    return compute


def remembered(squared_scores: Tensor, memory: float) -> Tensor:
    """Scores, scaled in place; with a memory of 0 nothing of them is left, were they no numbers."""
    return squared_scores.mul_(memory) if memory else squared_scores.zero_()


def add_squared_scores(squared_scores: Tensor, z: Tensor) -> None:
    """Add what the tokens of z [C, F] say to s_j^2, float32 [F], in place. One of which no neuron says anything adds nothing."""
    squared_scores.add_(say_shares(z))


def say_shares(z: Tensor, heard: Tensor | None = None) -> Tensor:
    """The sum over tokens of (z_tj / ||z_t||)^2 for z [C, F], float32 [F]. heard: what each counts for, [C]; None: 1."""
    squares = z.float().square()  # [C, F]
    token_squares = squares.sum(dim=1).clamp_(min=torch.finfo(torch.float32).tiny)  # [C]: ||z_t||^2
    weights = token_squares.reciprocal_()
    return squares.t() @ (weights if heard is None else weights.mul_(heard))


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices int64 [count] of the largest of scores [F], sorted; of equals the first."""
    ranked = scores.sort(descending=True, stable=True).indices
    return ranked[:count].sort().values
