"""A quantised copy as the draft: which neurons are copied, and the feed-forward blocks of the passes around it.

Chosen as a hot set is (hot.py), by the prompt and by what corrections learn. But the copy is not a part of the target: the full
model computes all neurons as they pass, which is what the plain model does, to the bit. A neuron keeps its place in the copy as
long as it is among the chosen, also from prompt to prompt, as quantising another into its place costs far more than moving bytes.
So the order in which a draft sums up neurons depends on answers before; which neurons it sums up does not. Where all neurons are
copied there is nothing to choose.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.kernels.matrix import combine
from offload_sirius.model.feed_forward import DenseFeedForward, Neurons
from offload_sirius.model.ops import gated_activations
from offload_sirius.model.source import NeuronWeights
from offload_sirius.sparsity.griffin import remembered, say_shares, scored
from offload_sirius.sparsity.hot import HotFeedForward, HotStatistic, exchanges
from offload_sirius.weights.interrupts import interrupts_held
from offload_sirius_loaders.spec import ModelSpec


class CopySource(Protocol):
    """What a copied set needs of a weight source."""

    def neurons(self, layer: int) -> NeuronWeights:
        """In a draft step those of the copy, by their places; else all of the layer."""

    def copy(self, layer: int, places: Tensor, neuron_ids: Tensor) -> None:
        """Quantise neurons of the layer that passes into places of the copy, int64 [k] each."""


class CopiedSet(HotStatistic):
    """Statistic, places, and the feed-forward blocks of the four kinds of passes."""

    def __init__(
        self, spec: ModelSpec, source: CopySource, num_copied: int, *, decay: float | None, device: torch.device
    ) -> None:
        """num_copied: N of each layer, of which the source has copied the first ones. decay: as for HotSet."""
        super().__init__(spec, num_copied, decay=decay, device=device)
        self.source = source
        self.all_ids = torch.arange(spec.ffn_width, device=device)
        self.ids.copy_(self.all_ids)
        self.broken_layers = set[int]()
        """Of their places nobody knows what is in them, as copying into some failed."""
        self.prefill = SettlingFeedForward(self)
        self.draft = HotFeedForward(self)
        self.full = DenseFeedForward(source, spec.activation)
        self.correction = ObservedFeedForward(self)

    def place(self, layer: int, places: Tensor, neuron_ids: Tensor) -> None:
        """Copy neurons of the layer that passes into places of others, int64 [k] each."""
        if len(places) == 0:
            return
        with interrupts_held():  # what the ids say is in the copy
            try:
                self.hot_ids(layer)[places] = neuron_ids
                is_cold = torch.ones_like(self.all_ids, dtype=torch.bool)
                is_cold[self.hot_ids(layer)] = False
                self.cold_ids(layer).copy_(torch.nonzero(is_cold).flatten())
                self.source.copy(layer, places, neuron_ids)
            except BaseException:
                self.broken_layers.add(layer)
                raise


class SettlingFeedForward:
    """All neurons of a layer; the best of them are copied, those that are so already where they are."""

    def __init__(self, copied: CopiedSet) -> None:
        self._copied = copied

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        copied = self._copied
        scores = remembered(copied.squared_scores[layer], copied.memory)
        return scored(copied.source.neurons(layer), copied.activation, scores)

    def close(self, layer: int) -> None:
        """See FeedForward. Waits for the device."""
        copied = self._copied
        scores, places = copied.squared_scores[layer], copied.hot_ids(layer)
        if copied.prior is not None:
            scores.add_(copied.prior.pseudo_scores(layer), alpha=1 - copied.memory)
        if copied.num_hot == len(scores):
            return
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[scores.sort(descending=True, stable=True).indices[: copied.num_hot]] = True
        if layer in copied.broken_layers:
            copied.place(layer, copied.all_ids[: copied.num_hot], torch.nonzero(chosen).flatten())
            copied.broken_layers.remove(layer)
            return
        left = torch.nonzero(~chosen[places]).flatten()  # places of neurons that go
        arriving = chosen.clone()
        arriving[places] = False
        coming = torch.nonzero(arriving).flatten()
        copied.place(layer, left, coming)


class ObservedFeedForward:
    """All neurons, and what they say of a window is learnt, and decides which are copied in the next one."""

    def __init__(self, copied: CopiedSet) -> None:
        self._copied = copied

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        copied, neurons = self._copied, self._copied.source.neurons(layer)
        if copied.decay is not None:
            copied.squared_scores[layer].mul_(copied.decay)

        def compute(x: Tensor) -> Tensor:
            z = gated_activations(x, neurons, copied.activation)  # [C, D] -> [C, F]
            self._observe(layer, z)
            return combine(z, neurons.down)  # -> [C, D]

        return compute

    def _observe(self, layer: int, z: Tensor) -> None:
        copied = self._copied
        if copied.prior is None and copied.decay is None:
            return
        said = say_shares(z, copied.heard)  # [F]
        if copied.prior is not None:
            copied.prior.learn(layer, copied.all_ids, said)
        if copied.decay is not None:
            copied.squared_scores[layer].add_(said)

    def close(self, layer: int) -> None:
        """See FeedForward. Waits for the device where not all neurons are copied."""
        copied = self._copied
        scores, hot_ids, cold_ids = copied.squared_scores[layer], copied.hot_ids(layer), copied.cold_ids(layer)
        if copied.decay is None or len(cold_ids) == 0:
            return
        places, others = exchanges(scores[hot_ids], scores[cold_ids])
        copied.num_exchanged += len(places)
        copied.place(layer, places, cold_ids[others])
