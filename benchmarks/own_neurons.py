"""Answers that share their passes and yet have neurons of their own, as each would have by itself.

Answers that an engine writes together share one set of neurons, and so their drafts depend on their company: for quality each has
to draft as if it were alone. Here each has a statistic of its own, and every pass brings all neurons, of which those that an
answer does not keep are silenced in its rows. That is the same arithmetic, a few times sooner, and it says nothing of speed or
bytes. tests/test_quality_benchmark.py compares answers with those of an engine that answers one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from offload_sirius.config import MAX_TREE_NODES, DecodingConfig
from offload_sirius.decode.model import Ask
from offload_sirius.engine import Engine
from offload_sirius.engine.planning import sparsity_of
from offload_sirius.engine.streamed import FULL_WAYS, StreamedModel, Way
from offload_sirius.kernels.matrix import combine, project
from offload_sirius.model.feed_forward import FeedForward, Neurons
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.ops import gated_activations
from offload_sirius.model.source import NeuronWeights
from offload_sirius.model.transformer import Transformer
from offload_sirius.sparsity.cats import Cats
from offload_sirius.sparsity.griffin import Griffin
from offload_sirius.weights.streamer import WeightStreamer


def num_together(decoding: DecodingConfig, wanted: int) -> int:
    """Answers that may share passes without windows becoming shorter than they would be alone."""
    return max(1, min(wanted, MAX_TREE_NODES // decoding.max_nodes))


def give_own_neurons(engine: Engine) -> None:
    """Have the engine's answers draft as if each were alone. It was loaded with streamed drafts."""
    decoding, transformer = engine.config.decoding, engine._transformer  # how passes are made is no part of an engine's surface
    kind = sparsity_of(decoding, engine.spec)
    if kind is None:
        return
    caches = [slot.cache for slot in engine._streamed.slots]
    streamer = engine.streamer
    assert isinstance(streamer, WeightStreamer), streamer
    num_kept = decoding.num_kept(engine.spec.ffn_width)
    drafts: OwnGriffin | OwnCats
    if kind == "griffin":
        source, dtype, device = WholeSource(streamer), transformer.cache.dtype, engine.device
        drafts = OwnGriffin([Griffin(engine.spec, source, num_kept, dtype=dtype, device=device) for _ in caches])
    else:
        drafts = OwnCats(Cats(engine.spec, streamer, num_kept, caches={}))
    engine._streamed = OwnNeuronsModel(transformer, streamer, caches[1:], drafts)


class WholeSource:
    """Satisfies griffin's KeepingSource: hands out all neurons, whatever is kept."""

    def __init__(self, streamer: WeightStreamer) -> None:
        self._streamer = streamer

    def neurons(self, layer: int) -> NeuronWeights:
        """See WeightSource."""
        return self._streamer.neurons(layer)

    def keep(self, layer: int, neuron_ids: Tensor) -> None:
        """See KeepingSource."""


class OwnGriffin:
    """One set of neurons for each answer, chosen by its prompt. Feed-forward of draft steps of several answers."""

    def __init__(self, griffins: Sequence[Griffin]) -> None:
        """griffins: one for each place that an answer may have."""
        self._griffins = griffins
        self.groups: Sequence[tuple[int, int]] = ()
        """Of the next pass, in the order of its rows: place of the answer, and its number of rows."""

    def prefill(self, place: int) -> FeedForward:
        """What a prompt's pass does."""
        return self._griffins[place].prefill

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        source, activation = self._griffins[0].source, self._griffins[0].activation
        neurons = source.neurons(layer)
        mask = torch.cat([self._griffins[place].masks[layer].expand(num_rows, -1) for place, num_rows in self.groups])  # [C, F]

        def compute(x: Tensor) -> Tensor:
            return combine(gated_activations(x, neurons, activation).mul_(mask), neurons.down)  # [C, D] -> [C, D]

        return compute

    def close(self, layer: int) -> None:
        """See FeedForward."""


class OwnCats:
    """A set of neurons for each step of each answer, by the gates of its own rows. Otherwise as OwnGriffin."""

    def __init__(self, cats: Cats) -> None:
        self._cats = cats
        self.groups: Sequence[tuple[int, int]] = ()

    def prefill(self, place: int) -> None:
        """What a prompt's pass does: computes all neurons, and chooses none."""
        return None

    def open(self, layer: int) -> Neurons:
        """See FeedForward."""
        cats, neurons = self._cats, self._cats.source.neurons(layer)

        def compute(x: Tensor) -> Tensor:
            gates = cats.activation(project(x, neurons.gate))  # [C, D] -> [C, F]
            for own in gates.split([num_rows for _, num_rows in self.groups]):
                own.mul_(cats.needed(layer, own))
            return combine(gates.mul_(project(x, neurons.up)), neurons.down)  # [C, F] -> [C, D]

        return compute

    def close(self, layer: int) -> None:
        """See FeedForward."""


class OwnNeuronsModel(StreamedModel):
    """The model with such drafts."""

    def __init__(
        self, transformer: Transformer, streamer: WeightStreamer, more_caches: Sequence[KVCache], drafts: OwnGriffin | OwnCats
    ) -> None:
        """more_caches: as for StreamedModel."""
        self._drafts = drafts
        super().__init__(transformer, streamer, FULL_WAYS | {"draft": Way(feed_forward=drafts)}, more_caches=more_caches)

    def run(self, asks: Sequence[Ask]) -> list[Tensor]:
        """See Model. Prompts are read one by one, as each has a statistic of its own."""
        places = [next(place for place, slot in enumerate(self.slots) if slot is ask.slot) for ask in asks]
        if asks[0].kind != "prefill":
            self._drafts.groups = [(place, len(ask.token_ids)) for place, ask in zip(places, asks, strict=True)]
            return super().run(asks)
        return [self._prompt(place, ask) for place, ask in zip(places, asks, strict=True)]

    def _prompt(self, place: int, ask: Ask) -> Tensor:
        self._ways = {**self._ways, "prefill": Way(feed_forward=self._drafts.prefill(place))}
        [logits] = super().run([ask])
        return logits
