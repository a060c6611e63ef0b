"""Fine sparsity: a set of neurons for every token, chosen by their gates. CATS, arXiv 2404.08763, with top-k as Sirius uses it.

    g = act(x gate^T)        computed for all neurons: the gates of a layer always cross the link
    kept                     the N with the largest |g|; of several tokens, the leaves of a tree, the largest sums of |g|,
                             so that one common set is fetched
    y = (g * (x up^T)) down  over those that are kept: only their up rows and down columns are needed

What the last tokens needed is on the device still, in a cache of neuron records, and only the rest is fetched. Instead of a fixed
number, a threshold may decide: each neuron with |g| (its mean over several tokens) at or above it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.kernels.matrix import Matrix, combine, project
from offload_sirius.model.feed_forward import Neurons
from offload_sirius.model.ops import activation_named
from offload_sirius.model.source import NeuronWeights
from offload_sirius_loaders.spec import ModelSpec

CALIBRATION_ROWS = 64
"""Tokens of a chunk whose gates are looked at for a threshold: enough for one number of each layer."""


class Reader(Protocol):
    """Reads records of one layer's neurons, wherever they are."""

    def up(self, records: Tensor) -> Matrix:
        """[M, ...] -> [M, D]"""

    def down(self, records: Tensor) -> Matrix:
        """[M, ...] -> [M, D]"""


class ReadNeurons(NeuronWeights, Protocol):
    """Neurons of a layer, and how others of it are read."""

    @property
    def reader(self) -> Reader:
        """Of this layer; while it is not released."""


class Fetched(Protocol):
    """Records that have been sent for."""

    def wait(self) -> Tensor:
        """[M, 2, R], R numbers or bytes a row, or bytes of records [M, R], once they are there."""


class FetchingSource(Protocol):
    """What fine sparsity needs of a weight source."""

    def neurons(self, layer: int) -> ReadNeurons:
        """See WeightSource. In a draft step only the gates have to be there."""

    def has_records(self, layer: int) -> bool:
        """Whether all of the neurons of the layer that was last asked for are there."""

    def fetch(self, layer: int, neuron_ids: Tensor) -> Fetched:
        """Send for up and down records of neurons, int64 [M] in host memory, of the layer that was last asked for."""


class RecordCache(Protocol):
    """Up and down records of one layer that are on the device, whatever is in its slot."""

    def missing(self, needed: Tensor) -> Tensor:
        """Of the needed neurons, bool [F], those that are not here, int64 [M]; the others count as used now."""

    def held(self) -> tuple[Tensor, Tensor]:
        """Neurons that are here, int64 [c], and their records [c, 2, R]."""

    def insert(self, neuron_ids: Tensor, records: Tensor) -> None:
        """Take in neurons, int64 [M], that were missing, records [M, 2, R], in the places of those used longest ago."""


@dataclass
class FetchCounts:
    """Neuron records that draft steps needed of layers without all of them."""

    needed: int = 0
    missing: int = 0

    @property
    def hit_share(self) -> float | None:
        """Share that was on the device already; None where none was needed."""
        return 1 - self.missing / self.needed if self.needed else None


class Cats:
    """The choice, the caches, and the feed-forward blocks."""

    def __init__(
        self,
        spec: ModelSpec,
        source: FetchingSource,
        num_kept: int,
        *,
        caches: Mapping[int, RecordCache],
        thresholds: Tensor | None = None,
        calibrate: bool = False,
    ) -> None:
        """num_kept: N of each layer, below F. caches: layer -> its cache, for layers that have one.

        thresholds: float32 [L], None where the N largest are kept; calibrate: they are taken from each prompt.
        """
        assert 0 < num_kept < spec.ffn_width, (num_kept, spec.ffn_width)
        assert thresholds is not None or not calibrate
        self.num_kept = num_kept
        self.keep_share = num_kept / spec.ffn_width
        self.source = source
        self.caches = caches
        self.thresholds = thresholds
        self.activation = activation_named(spec.activation)
        self.counts = FetchCounts()
        self.prefill = CalibratingFeedForward(self) if calibrate else None
        """Computes all neurons, and finds thresholds; None where there is nothing to find."""
        self.draft = SelectingFeedForward(self)
        """Computes the neurons that are kept."""
        self.num_staying = 0
        """Tokens for which the thresholds before count when a prompt comes."""

    def remember(self, num_staying: int, num_heard: int) -> None:
        """A prompt comes. Of so many tokens that were heard so many stay, and count as before."""
        self.num_staying = num_staying

    def needed(self, layer: int, gates: Tensor) -> Tensor:
        """Which neurons to keep for gates [C, F]: bool [F]."""
        scores = gates.abs().sum(dim=0, dtype=torch.float32)  # [C, F] -> [F]
        if self.thresholds is not None:
            return scores >= self.thresholds[layer] * gates.shape[0]
        kept = scores.topk(self.num_kept).indices
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, kept, True)


class SelectingFeedForward:
    """The neurons that these very tokens need."""

    def __init__(self, cats: Cats) -> None:
        self._cats = cats

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        cats = self._cats
        neurons = cats.source.neurons(layer)
        whole = cats.source.has_records(layer)

        def compute(x: Tensor) -> Tensor:
            gates = cats.activation(project(x, neurons.gate))  # [C, D] -> [C, F]
            needed = cats.needed(layer, gates)
            if whole:
                return combine(gates.mul_(needed).mul_(project(x, neurons.up)), neurons.down)
            return self._fetched(layer, neurons.reader, x, gates, needed)

        return compute

    def close(self, layer: int) -> None:
        """See FeedForward."""

    def _fetched(self, layer: int, reader: Reader, x: Tensor, gates: Tensor, needed: Tensor) -> Tensor:
        """x [C, D], gates [C, F], needed bool [F] -> [C, D]. Waits for the link; computes on cached records meanwhile."""
        cats, cache = self._cats, self._cats.caches.get(layer)
        missing = needed.nonzero().squeeze(1) if cache is None else cache.missing(needed)  # [M]
        cats.counts.needed += int(needed.sum())
        cats.counts.missing += len(missing)
        fetched = cats.source.fetch(layer, missing.cpu()) if len(missing) else None
        y = torch.zeros_like(x)
        if cache is not None:
            held, records = cache.held()  # [c], [c, 2, R]
            # Neurons in the cache that this token does not need are silenced: gathering the others would cost as much.
            y += _say(reader, x, gates[:, held] * needed[held], records)
        if fetched is not None:
            records = fetched.wait()  # [M, 2, R]
            y += _say(reader, x, gates[:, missing], records)
            if cache is not None:
                cache.insert(missing, records)
        return y


def _say(reader: Reader, x: Tensor, gates: Tensor, records: Tensor) -> Tensor:
    """x [C, D], gates [C, M] and up and down records [M, ...] -> what these neurons add, [C, D]."""
    return combine(gates * project(x, reader.up(records)), reader.down(records))


class CalibratingFeedForward:
    """All neurons; their gates give each layer the threshold that the wanted share of them reaches."""

    def __init__(self, cats: Cats) -> None:
        self._cats = cats
        self._num_rows = 0

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        cats, neurons = self._cats, self._cats.source.neurons(layer)
        assert cats.thresholds is not None
        threshold = cats.thresholds[layer]
        threshold.copy_(threshold * cats.num_staying if cats.num_staying else torch.zeros_like(threshold))
        self._num_rows = cats.num_staying

        def compute(x: Tensor) -> Tensor:
            gates = cats.activation(project(x, neurons.gate))  # [C, D] -> [C, F]
            threshold.add_(reached_by(gates, cats.keep_share), alpha=x.shape[0])
            self._num_rows += x.shape[0]
            return combine(gates.mul_(project(x, neurons.up)), neurons.down)  # [C, F] -> [C, D]

        return compute

    def close(self, layer: int) -> None:
        """See FeedForward. The mean over chunks, each weighted by its tokens, and over what stays of texts before."""
        assert self._cats.thresholds is not None
        self._cats.thresholds[layer].div_(self._num_rows)


def reached_by(gates: Tensor, share: float) -> Tensor:
    """The |g| that this share of gates [C, F] reaches, float32 []; of many tokens some, evenly spread, are looked at."""
    step = -(-gates.shape[0] // CALIBRATION_ROWS)
    sizes = gates[::step].abs().float().flatten()
    num_kept = max(1, int(sizes.numel() * share))
    return sizes.kthvalue(sizes.numel() - num_kept + 1).values
