"""The hot set: coarse sparsity whose kept neurons are the resident part of the full model itself.

A draft step computes the N hot neurons of each layer, which are on the device. The full model computes them too, and the cold
ones as they pass, so that only those cross the link:

    y = z[hot] down[hot] + z[cold] down[cold]        summed in float32

The hot neurons are chosen by the prompt, with the statistic of `griffin.py`. A correction learns anew what each neuron of each
layer says of the window, so the statistic is kept up to date for nothing,

    s^2 <- decay * s^2 + sum over the window's tokens of (z_tj / ||z_t||)^2

and a cold neuron that has become better than a hot one, by more than what would have them change places all the time, takes its
place while it passes. A prompt whose beginning was computed before adds to what is known of that. A draft may compute fewer
neurons than are hot: the M best of them stand in front, so that it reads one range of places. Knows neither slots nor links.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.kernels.matrix import Matrix, combine
from offload_sirius.model.feed_forward import Neurons, NeuronSource
from offload_sirius.model.ops import Activation, activation_named, gated_activations
from offload_sirius.model.source import NeuronWeights
from offload_sirius.sparsity.griffin import remembered, say_shares, scored
from offload_sirius.sparsity.prior import NeuronPrior
from offload_sirius_loaders.spec import ModelSpec

HYSTERESIS = 0.1
"""A cold neuron is taken for a hot one when its s^2 is larger by more than this share: of equals neither moves."""


class HotSource(Protocol):
    """What a hot set needs of a weight source."""

    def neurons(self, layer: int) -> NeuronWeights:
        """While hot neurons are chosen all of the layer, afterwards those that are hot, in the order of their places."""

    def cold_neurons(self, layer: int) -> NeuronWeights:
        """The others, in the order in which they were said to be cold; blocks until they are there."""

    def choose(self, layer: int, hot_ids: Tensor, cold_ids: Tensor) -> None:
        """These neurons of the layer that passes, int64 [N], are hot from now on, and these, int64 [F - N], cold."""

    def exchange(self, layer: int, hot_places: Tensor, cold_places: Tensor, cold_ids: Tensor) -> None:
        """Cold neurons of the layer that passes take places of hot ones, int64 [k] each; cold_ids: [F - N], cold from now on."""

    def swap(self, layer: int, places: Tensor, other_places: Tensor) -> None:
        """Hot neurons of the layer in some places and in others, int64 [k] each, change places."""


class HotStatistic:
    """What is known of neurons, and which of them are in places on the device."""

    def __init__(self, spec: ModelSpec, num_hot: int, *, decay: float | None, device: torch.device) -> None:
        """num_hot: N of each layer. decay: of the statistic from window to window; None leaves the set as the prompt
        chose it. Allocates what `sparsity_nbytes` says, but for the prior."""
        assert 0 <= num_hot <= spec.ffn_width, (num_hot, spec.ffn_width)
        self.num_hot = num_hot
        self.num_drafted = num_hot
        """M: neurons that a draft computes, at most N."""
        self.decay = decay
        self.activation = activation_named(spec.activation)
        self.squared_scores = torch.zeros(spec.num_layers, spec.ffn_width, device=device)  # [L, F]
        self.ids = torch.zeros_like(self.squared_scores, dtype=torch.int64)  # [L, F]
        """Hot neurons by their places, those first that drafts compute, then cold ones, sorted."""
        self.prior: NeuronPrior | None = None
        """Has a say, and learns; None where it shall not."""
        self.heard: Tensor | None = None
        """1 for tokens of a correction of which the statistic is to learn, 0 for others, float32 [S]; None: of all. What was
        looked up mostly is not said.
        With them a correction of SmolLM2-135M gave 4.16 tokens, without them 4.25 (12 prompts, windows of 8)."""
        self.memory = 0.0
        """What earlier scores count for when a prompt comes."""
        self.num_exchanged = 0
        """Neurons that became hot, of all layers and windows."""

    def begin(self, num_drafted: int, prior: NeuronPrior | None) -> None:
        """A prompt comes. num_drafted: M, at most N. prior: has a say in which neurons become hot, and learns; None where the
        text shall not depend on it."""
        assert 0 < num_drafted <= self.num_hot, (num_drafted, self.num_hot)
        self.num_drafted = num_drafted
        self.prior = prior

    def remember(self, num_staying: int, num_heard: int) -> None:
        """A prompt comes. Of so many tokens that were heard so many stay, and count as before."""
        self.memory = num_staying / num_heard if num_heard else 0.0

    def hot_ids(self, layer: int) -> Tensor:
        """Neuron in each hot place, int64 [N]: a view."""
        return self.ids[layer, : self.num_hot]

    def cold_ids(self, layer: int) -> Tensor:
        """The others, int64 [F - N], in the order in which they arrive: a view."""
        return self.ids[layer, self.num_hot :]


class HotSet(HotStatistic):
    """Hot neurons that are the target's own, and the feed-forward blocks of the four kinds of passes."""

    def __init__(self, spec: ModelSpec, source: HotSource, num_hot: int, *, decay: float | None, device: torch.device) -> None:
        """See HotStatistic."""
        super().__init__(spec, num_hot, decay=decay, device=device)
        self.source = source
        self.prefill = ChoosingFeedForward(self)
        self.draft = HotFeedForward(self)
        self.full = BothFeedForward(self)
        self.correction = LearningFeedForward(self) if decay is None else RefreshingFeedForward(self, decay)


class ChoosingFeedForward:
    """All neurons of a layer; the best of them become hot."""

    def __init__(self, hot_set: HotSet) -> None:
        self._hot_set = hot_set

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        hot_set = self._hot_set
        scores = remembered(hot_set.squared_scores[layer], hot_set.memory)
        return scored(hot_set.source.neurons(layer), hot_set.activation, scores)

    def close(self, layer: int) -> None:
        """See FeedForward."""
        hot_set = self._hot_set
        if hot_set.prior is not None:
            # As much of it as is remembered has been added before.
            hot_set.squared_scores[layer].add_(hot_set.prior.pseudo_scores(layer), alpha=1 - hot_set.memory)
        ranked = hot_set.squared_scores[layer].sort(descending=True, stable=True).indices  # [F]
        num_front = hot_set.num_drafted
        parts = (num_front, hot_set.num_hot - num_front, len(ranked) - hot_set.num_hot)  # front, back, cold
        for ids, chosen in zip(hot_set.ids[layer].split(parts), ranked.split(parts), strict=True):
            ids.copy_(chosen.sort().values)
        hot_set.source.choose(layer, hot_set.hot_ids(layer), hot_set.cold_ids(layer))


@dataclass(frozen=True)
class FrontNeurons:
    """Neurons in the first places of a layer. Satisfies the model's NeuronWeights."""

    gate: Matrix
    """[M, D], as all of them."""
    up: Matrix
    down: Matrix


def front_neurons(neurons: NeuronWeights, count: int) -> FrontNeurons:
    """The first of them: views."""
    return FrontNeurons(neurons.gate[:count], neurons.up[:count], neurons.down[:count])


class DraftedSet(Protocol):
    """What a draft step needs of a hot set, whatever its neurons are."""

    num_hot: int
    num_drafted: int
    activation: Activation

    @property
    def source(self) -> NeuronSource:
        """In a draft step it hands out hot neurons, by their places."""


class HotFeedForward:
    """Hot neurons only, or the best of them."""

    def __init__(self, hot_set: DraftedSet) -> None:
        self._hot_set = hot_set

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        neurons, activation = self._hot_set.source.neurons(layer), self._hot_set.activation
        if (count := self._hot_set.num_drafted) < self._hot_set.num_hot:
            neurons = front_neurons(neurons, count)
        return lambda x: combine(gated_activations(x, neurons, activation), neurons.down)  # [C, D] -> [C, N] -> [C, D]

    def close(self, layer: int) -> None:
        """See FeedForward."""


class BothFeedForward:
    """All neurons: hot ones while the cold ones still arrive, then those."""

    def __init__(self, hot_set: HotSet) -> None:
        self._hot_set = hot_set

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        hot_set, hot = self._hot_set, self._hot_set.source.neurons(layer)

        def compute(x: Tensor) -> Tensor:
            hot_z = gated_activations(x, hot, hot_set.activation)  # [C, D] -> [C, N]
            y = combine(hot_z, hot.down).float()  # -> [C, D]
            cold = hot_set.source.cold_neurons(layer)
            cold_z = gated_activations(x, cold, hot_set.activation)  # [C, D] -> [C, F - N]
            y += combine(cold_z, cold.down)
            self.observe(layer, hot_z, cold_z)
            return y.to(x.dtype)

        return compute

    def observe(self, layer: int, hot_z: Tensor, cold_z: Tensor) -> None:
        """What neurons have said: [C, N] and [C, F - N]."""

    def close(self, layer: int) -> None:
        """See FeedForward."""


class LearningFeedForward(BothFeedForward):
    """The same, and the prior learns what they say."""

    def observe(self, layer: int, hot_z: Tensor, cold_z: Tensor) -> None:
        """See BothFeedForward."""
        if self._hot_set.prior is not None:
            self.learn(layer, self.heard(hot_z, cold_z))

    def heard(self, hot_z: Tensor, cold_z: Tensor) -> Tensor:
        """What neurons say of the tokens that are to be learnt from, by their places, float32 [F]."""
        return said_by(hot_z, cold_z, self._hot_set.heard)

    def learn(self, layer: int, said: Tensor) -> None:
        """said: what neurons say of a window, by their places, float32 [F]."""
        hot_set = self._hot_set
        if hot_set.prior is not None:
            hot_set.prior.learn(layer, hot_set.ids[layer], said)


class RefreshingFeedForward(LearningFeedForward):
    """The same, and what they say of a window decides which are hot in the next one."""

    def __init__(self, hot_set: HotSet, decay: float) -> None:
        super().__init__(hot_set)
        self._decay = decay

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        self._hot_set.squared_scores[layer].mul_(self._decay)
        return super().open(layer)

    def observe(self, layer: int, hot_z: Tensor, cold_z: Tensor) -> None:
        """See BothFeedForward."""
        hot_set = self._hot_set
        said = self.heard(hot_z, cold_z)
        self.learn(layer, said)
        hot_set.squared_scores[layer].index_add_(0, hot_set.ids[layer], said)

    def close(self, layer: int) -> None:
        """See FeedForward. Waits for the device once, and once more where drafts compute fewer neurons than are hot."""
        self._exchange(layer)
        if self._hot_set.num_drafted < self._hot_set.num_hot:
            self._reorder(layer)

    def _exchange(self, layer: int) -> None:
        """Cold neurons that have become better take the places of hot ones."""
        hot_set = self._hot_set
        hot_ids, cold_ids = hot_set.hot_ids(layer), hot_set.cold_ids(layer)
        scores = hot_set.squared_scores[layer]
        hot_places, cold_places = exchanges(scores[hot_ids], scores[cold_ids])
        if len(hot_places) == 0:
            return
        hot_ids[hot_places], cold_ids[cold_places] = cold_ids[cold_places], hot_ids[hot_places]
        cold_ids.copy_(cold_ids.sort().values)
        hot_set.num_exchanged += len(hot_places)
        hot_set.source.exchange(layer, hot_places, cold_places, cold_ids)

    def _reorder(self, layer: int) -> None:
        """Hot neurons that have become better change places with those in front."""
        hot_set = self._hot_set
        ids, scores = hot_set.hot_ids(layer), hot_set.squared_scores[layer]
        front, back = scores[ids].split((hot_set.num_drafted, hot_set.num_hot - hot_set.num_drafted))
        places, others = exchanges(front, back)
        if len(places) == 0:
            return
        others = others + hot_set.num_drafted
        ids[places], ids[others] = ids[others], ids[places]
        hot_set.source.swap(layer, places, others)


def said_by(hot_z: Tensor, cold_z: Tensor, heard: Tensor | None = None) -> Tensor:
    """What neurons say of the tokens of [C, N] and [C, F - N]: sums of shares by place, float32 [F]. heard: see `say_shares`."""
    return say_shares(torch.cat((hot_z, cold_z), dim=1), heard)


def exchanges(hot_scores: Tensor, cold_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Which places to exchange, int64 [k] each: the worst hot ones for the best cold ones, while those are better by HYSTERESIS.

    hot_scores: s^2 by place [N], cold_scores [F - N]. Likewise of the hot ones those in front and those behind.
    """
    most = min(len(hot_scores), len(cold_scores))
    hot, cold = hot_scores.sort(stable=True), cold_scores.sort(descending=True, stable=True)
    # Hot ones get better along the way and cold ones worse, so that those to be exchanged come first.
    count = int((cold.values[:most] > hot.values[:most] * (1 + HYSTERESIS)).sum())
    return hot.indices[:count], cold.indices[:count]
