"""Layers that are on the device in part: hot and cold neurons are always exactly a layer's, however late their bytes come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.errors import WeightReadError
from offload_sirius.weights.buffers import KeptNeurons, LayerBuffer, kept_neurons
from offload_sirius.weights.hot_plan import hot_layouts
from offload_sirius.weights.hotset import HotSlot, HotStreamer, whole_slot
from offload_sirius.weights.layout import Cargo, LayerLayout, Part, layer_layout
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:tiny?ffn=16&width=32&heads=4&kv_heads=2").spec
NUM_LAYERS, F, N = 5, 16, 6
LAYOUTS = hot_layouts(SPEC, layer_layout(SPEC, 4), N)
ALL_NBYTES, HOT_NBYTES, COLD_NBYTES = F * 3 * 32 * 4, N * 3 * 32 * 4, (F - N) * 3 * 32 * 4
WHOLE = layer_layout(SPEC, 4)
ALL_LAYERS = tuple(range(NUM_LAYERS))
NAMES = torch.arange(F, dtype=torch.float32)
"""Every element of a neuron is its number, and a hundred for each layer."""


class NoEmbedding:
    def rows(self, token_ids: Tensor) -> Tensor:
        return token_ids


@dataclass
class LateGather:
    """Brings neurons when it is waited for, and not before. Takes their numbers when it was asked, as a link may."""

    layer: int
    neuron_ids: Tensor
    place: KeptNeurons
    error: WeightReadError | None = None
    done: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.place.gate, self.place.up_down

    def wait(self) -> None:
        if self.error is not None:
            self.done = True
            raise self.error
        if not self.done:
            names = NAMES[self.neuron_ids] + 100 * self.layer
            self.place.gate[:] = names[:, None]
            self.place.up_down[:] = names[:, None, None]
            self.done = True


@dataclass
class LateAttention:
    """The same of an attention block, whose every byte is the layer's number."""

    layer: int
    place: Tensor
    error: WeightReadError | None = None
    done: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.place,)

    def wait(self) -> None:
        if self.error is not None:
            self.done = True
            raise self.error
        if not self.done:
            self.place.fill_(self.layer)
            self.done = True


LateT = TypeVar("LateT", LateGather, LateAttention)


@dataclass
class LateCopier:
    """Poisons what it is going to overwrite, and delivers in any order, as late as it may."""

    pick: Callable[[int], int] = lambda below: 0
    gathered: list[tuple[int, int]] = field(default_factory=list)
    """Layers, and how many of their neurons."""
    under_way: list[LateGather | LateAttention] = field(default_factory=list)
    broken: bool = False
    nbytes_copied: int = 0
    busy_seconds: float = 0.0
    peak_bytes_per_second: float | None = None

    def start(self, layer: int, part: Part, slot: LayerBuffer) -> LateAttention:
        assert part == "attention", "neurons are gathered"
        place = slot.parts[part]
        return self.begin(LateAttention(layer, place.fill_(0xFF), self.error()), place.numel())

    def fetch(self, layer: int, neuron_ids: Tensor, slot: LayerBuffer) -> LateGather:
        raise AssertionError("no records pass alone")

    def gather(self, layer: int, neuron_ids: Tensor | None, place: KeptNeurons) -> LateGather:
        ids = torch.arange(F) if neuron_ids is None else neuron_ids.clone()
        assert len(ids) == len(place.gate)
        place.gate.fill_(float("nan"))
        place.up_down.fill_(float("nan"))
        self.gathered.append((layer, len(ids)))
        return self.begin(LateGather(layer, ids, place, self.error()), place.nbytes)

    def error(self) -> WeightReadError | None:
        return WeightReadError("broken") if self.broken else None

    def begin(self, transfer: LateT, nbytes: int) -> LateT:
        self.under_way = [each for each in self.under_way if not each.done]
        assert not any(overlap(each.tensors, transfer.tensors) for each in self.under_way), "two transfers to the same bytes"
        self.nbytes_copied += nbytes
        self.under_way.append(transfer)
        for _ in range(self.pick(3)):
            arriving = self.under_way[self.pick(len(self.under_way))]
            if arriving.error is None:
                arriving.wait()
        return transfer

    def close(self) -> None:
        pass


def overlap(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether they have a byte in common. Each lies in one piece."""
    return any(a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes for a, b in product(one, other))


@dataclass
class Model:
    """What a hot set does with its source, and what it checks of it."""

    streamer: HotStreamer
    copier: LateCopier
    hot: dict[int, Tensor] = field(default_factory=dict)
    cold: dict[int, Tensor] = field(default_factory=dict)

    def prefill(self, pick: Callable[[int], int], num_layers: int = NUM_LAYERS) -> None:
        """Choose any neurons."""
        self.streamer.begin("prefill", "records", following="hot")
        for layer in range(num_layers):
            self.attention(layer)
            assert names(self.streamer.neurons(layer), layer) == list(range(F))
            ranked = torch.tensor(shuffled(pick))
            self.hot[layer], self.cold[layer] = ranked[:N].sort().values, ranked[N:].sort().values
            self.streamer.choose(layer, self.hot[layer], self.cold[layer])
            self.streamer.release(layer)

    def draft(self, num_layers: int = NUM_LAYERS, following: Cargo = "hot") -> None:
        self.streamer.begin("draft", "hot", following=following)
        for layer in range(num_layers):
            self.attention(layer)
            assert names(self.streamer.neurons(layer), layer) == self.hot[layer].tolist()
            self.streamer.release(layer)

    def correct(
        self,
        num_exchanged: int,
        pick: Callable[[int], int],
        num_layers: int = NUM_LAYERS,
        half: bool = False,
        num_swapped: int = 0,
    ) -> None:
        """num_exchanged: neurons that change places in each layer. half: given up behind the hot neurons of the next layer.

        num_swapped: hot neurons that change places with other hot ones.
        """
        self.streamer.begin("correction", "cold", following="hot")
        for layer in range(min(num_layers + half, NUM_LAYERS)):
            self.attention(layer)
            hot = self.streamer.neurons(layer)
            assert names(hot, layer) == self.hot[layer].tolist()
            if layer == num_layers:
                return
            cold = self.streamer.cold_neurons(layer)
            assert names(cold, layer) == self.cold[layer].tolist()
            assert sorted(names(hot, layer) + names(cold, layer)) == list(range(F))
            if num_exchanged:
                self.exchange(layer, num_exchanged, pick)
            if num_swapped:
                self.swap(layer, num_swapped, pick)
            self.streamer.release(layer)

    def full(self) -> None:
        self.streamer.begin("full", "cold", following="cold")
        for layer in range(NUM_LAYERS):
            self.attention(layer)
            neurons = names(self.streamer.neurons(layer), layer) + names(self.streamer.cold_neurons(layer), layer)
            assert sorted(neurons) == list(range(F))
            self.streamer.release(layer)

    def exchange(self, layer: int, count: int, pick: Callable[[int], int]) -> None:
        hot, cold = self.hot[layer].clone(), self.cold[layer].clone()
        hot_places = torch.tensor(shuffled(pick, N)[:count])
        cold_places = torch.tensor(shuffled(pick, F - N)[:count])
        hot[hot_places], cold[cold_places] = cold[cold_places], hot[hot_places]
        self.hot[layer], self.cold[layer] = hot, cold.sort().values
        self.streamer.exchange(layer, hot_places, cold_places, self.cold[layer])

    def swap(self, layer: int, count: int, pick: Callable[[int], int]) -> None:
        """Among hot neurons."""
        hot, places = self.hot[layer].clone(), torch.tensor(shuffled(pick, N))
        some, others = places[:count], places[count : 2 * count]
        hot[some], hot[others] = hot[others], hot[some]
        self.hot[layer] = hot
        self.streamer.swap(layer, some, others)

    def attention(self, layer: int) -> None:
        assert (self.streamer.attention(layer).parts["attention"] == layer).all()

    def assert_sums_up(self) -> None:
        """Every byte that was sent was computed on, or thrown away, or is on its way."""
        streamer = self.streamer
        in_flight = sum(flight.nbytes for flight in streamer._ring)
        assert streamer.copied_nbytes == sum(streamer.pass_nbytes.values()) + streamer.discarded_nbytes + in_flight


def shuffled(pick: Callable[[int], int], count: int = F) -> list[int]:
    left = list(range(count))
    return [left.pop(pick(len(left))) for _ in range(count)]


def names(neurons: KeptNeurons | LayerBuffer, layer: int) -> list[int]:
    """Which neurons of the layer they are, every element of each."""
    found = neurons.gate[:, 0] - 100 * layer
    assert (neurons.gate == neurons.gate[:, :1]).all()
    assert (neurons.up == neurons.gate).all()
    assert (neurons.down == neurons.gate).all()
    return [int(each) for each in found]


def make(
    num_cold_slots: int = 3, num_whole_slots: int = 2, copier: LateCopier | None = None, hot: Sequence[int] = ALL_LAYERS
) -> Model:
    """hot: layers that are partly resident; where some are not, there are as many slots for all of a layer, and no others."""
    hot_spec, copier = replace(SPEC, ffn_width=N), copier or LateCopier()
    layers = {}
    for layer in hot:
        storage = torch.full((LAYOUTS.resident.nbytes,), 0xFF, dtype=torch.uint8)
        layers[layer] = LayerBuffer(storage, hot_spec, LAYOUTS.resident, torch.float32)
        layers[layer].parts["attention"].fill_(layer)
    memory = torch.zeros(max(num_whole_slots * WHOLE.nbytes, num_cold_slots * LAYOUTS.cold.kept_nbytes)).byte()

    def slots(cargo: Cargo, count: int, layout: LayerLayout) -> list[HotSlot]:
        nbytes = layout.kept_nbytes
        return [HotSlot({cargo: kept_neurons(memory[i * nbytes :][:nbytes], layout, torch.float32)}) for i in range(count)]

    def whole_slots() -> list[HotSlot]:
        places = memory[: num_whole_slots * WHOLE.nbytes].split(WHOLE.nbytes)
        return [whole_slot(LayerBuffer(place, SPEC, WHOLE, torch.float32), N) for place in places]

    cut_anew: dict[Cargo, Sequence[HotSlot]] = {
        "records": slots("records", num_whole_slots, LAYOUTS.whole),
        "cold": slots("cold", num_cold_slots, LAYOUTS.cold),
    }
    cargoes: tuple[Cargo, ...] = ("records", "hot", "cold")
    streamer = HotStreamer(
        layers=layers,
        streamed_layers=[layer for layer in ALL_LAYERS if layer not in hot],
        slots=cut_anew if len(hot) == NUM_LAYERS else dict.fromkeys(cargoes, whole_slots()),
        copier=copier,
        embedding=NoEmbedding(),
        final_norm=torch.ones(1),
        head=torch.ones(1, 1),
    )
    return Model(streamer, copier)


def last(below: int) -> int:
    """Picks the last: neurons come in falling order."""
    return below - 1


steps = st.lists(
    st.one_of(
        st.tuples(st.just("draft"), st.integers(0, NUM_LAYERS), st.just(0), st.just(False)),
        st.tuples(
            st.just("correct"),
            st.one_of(st.just(NUM_LAYERS), st.integers(0, NUM_LAYERS)),
            st.sampled_from([0, 0, 1, 3, N]),
            st.booleans(),
        ),
        st.tuples(st.just("full"), st.just(NUM_LAYERS), st.just(0), st.just(False)),
        st.tuples(st.just("prefill"), st.just(NUM_LAYERS), st.just(0), st.just(False)),
        st.tuples(st.just("give up a prefill"), st.integers(0, NUM_LAYERS - 1), st.just(0), st.just(False)),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(
    num_cold_slots=st.integers(2, NUM_LAYERS),
    num_whole_slots=st.integers(2, 4),
    hot=st.one_of(st.just(ALL_LAYERS), st.lists(st.sampled_from(ALL_LAYERS), max_size=NUM_LAYERS - 2, unique=True)),
    sequence=steps,
    data=st.data(),
)
def test_hot_and_cold_neurons_are_exactly_a_layer_s_whatever_passes_follow_each_other(
    num_cold_slots: int,
    num_whole_slots: int,
    hot: Sequence[int],
    sequence: list[tuple[str, int, int, bool]],
    data: st.DataObject,
) -> None:
    def pick(below: int) -> int:
        return data.draw(st.integers(0, below - 1))

    model, num_drafted = make(num_cold_slots, num_whole_slots, LateCopier(pick=pick), hot), 0
    random = iter(torch.randint(0, 1 << 30, (100_000,), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))))

    def draw(below: int) -> int:
        return int(next(random)) % below

    model.prefill(draw)
    for kind, num_layers, num_exchanged, half in sequence:
        if kind == "draft":
            model.draft(num_layers)
            num_drafted += len(set(range(num_layers)) - set(hot))
        elif kind == "correct":
            model.correct(num_exchanged, draw, num_layers, half, num_swapped=draw(N // 2 + 1))
        elif kind == "full":
            model.full()
        else:
            model.prefill(draw, num_layers)
        model.assert_sums_up()
    assert model.streamer.pass_nbytes["draft"] == num_drafted * (WHOLE.attention_nbytes + HOT_NBYTES)


def test_a_draft_moves_nothing_and_a_correction_what_is_cold() -> None:
    model = make()
    model.prefill(last)
    for num_exchanged in (0, 2, N):
        for _ in range(3):
            model.draft()
        model.correct(num_exchanged, last)
    model.full()
    assert model.streamer.pass_nbytes == {
        "prefill": NUM_LAYERS * ALL_NBYTES,
        "draft": 0,
        "correction": 3 * NUM_LAYERS * COLD_NBYTES,
        "full": NUM_LAYERS * COLD_NBYTES,
    }
    assert model.streamer.discarded_nbytes == 0
    # Three slots hold what the next pass begins with.
    assert model.streamer.copied_nbytes == NUM_LAYERS * ALL_NBYTES + (4 * NUM_LAYERS + 3) * COLD_NBYTES


def test_of_layers_of_which_nothing_is_resident_a_draft_moves_attention_and_hot_neurons_and_a_correction_all() -> None:
    model = make(hot=(0, 3))
    model.prefill(last)
    for num_exchanged in (0, 2, N):
        for _ in range(3):
            model.draft()
        model.correct(num_exchanged, last)
    model.full()
    corrected = 2 * COLD_NBYTES + 3 * WHOLE.nbytes
    assert model.streamer.pass_nbytes == {
        "prefill": 2 * ALL_NBYTES + 3 * WHOLE.nbytes,
        "draft": 9 * 3 * (WHOLE.attention_nbytes + HOT_NBYTES),
        "correction": 3 * corrected,
        "full": corrected,
    }
    # Three corrections and the full pass came where a draft step was to, two of whose layers had been sent.
    assert model.streamer.discarded_nbytes == 4 * 2 * (WHOLE.attention_nbytes + HOT_NBYTES)
    model.assert_sums_up()


def test_where_some_layers_pass_whole_the_link_goes_on_from_pass_to_pass() -> None:
    model = make(hot=(0, 3))
    model.prefill(last)
    sent = [(layer, F) for layer in ALL_LAYERS]
    assert model.copier.gathered == [*sent, (1, N), (2, N)]
    model.draft()
    assert model.copier.gathered == [*sent, (1, N), (2, N), (4, N), (1, N), (2, N)]
    model.draft(following="cold")
    assert model.copier.gathered[len(sent) + 5 :] == [(4, N), (0, F - N), (1, F)]
    model.correct(0, last)
    assert model.copier.gathered[len(sent) + 8 :] == [(2, F), (3, F - N), (4, F), (1, N), (2, N)]
    assert model.streamer.discarded_nbytes == 0


def test_many_neurons_change_places_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius.weights.hotset.EXCHANGED_AT_ONCE", 4)
    model = make()
    model.prefill(last)
    for num_exchanged in (N, 5, 4, 1, 0):
        model.correct(num_exchanged, last)


def test_many_hot_neurons_change_places_a_few_at_a_time_without_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius.weights.hotset.SWAPPED_AT_ONCE", 2)
    model, other = make(), make()
    for each, num_swapped in ((model, N // 2), (other, 0)):
        each.prefill(last)
        each.correct(0, lambda below: below // 2, num_swapped=num_swapped)
        each.draft()
    assert model.hot[0].tolist() != other.hot[0].tolist()
    assert model.streamer.copied_nbytes == other.streamer.copied_nbytes


def test_the_link_fills_the_slots_while_the_first_draft_computes() -> None:
    model = make()
    model.prefill(last)
    assert model.copier.gathered == [(layer, F) for layer in range(NUM_LAYERS)]
    model.streamer.begin("draft", "hot", following="hot")
    assert model.copier.gathered[NUM_LAYERS:] == [(0, F - N), (1, F - N), (2, F - N)]
    model.draft()
    assert len(model.copier.gathered) == NUM_LAYERS + 3


def test_nothing_is_copied_before_it_is_asked_for() -> None:
    model = make()
    model.streamer.begin("prefill", "records", following="hot")
    assert model.copier.gathered == []


def test_what_was_sent_for_a_correction_that_did_not_come_is_thrown_away_and_counted() -> None:
    model = make()
    model.prefill(last)
    model.draft()
    model.prefill(last)
    assert model.streamer.discarded_nbytes == 3 * COLD_NBYTES
    model.assert_sums_up()


def test_a_neuron_that_has_become_cold_comes_back_over_the_link() -> None:
    model = make()
    model.prefill(lambda below: 0)
    assert model.hot[3].tolist() == [0, 1, 2, 3, 4, 5]
    model.correct(1, lambda below: 0)
    assert (model.hot[3].tolist(), model.cold[3].tolist()) == ([6, 1, 2, 3, 4, 5], [0, 7, 8, 9, 10, 11, 12, 13, 14, 15])
    model.correct(0, last)
    assert model.streamer.discarded_nbytes == 0


def test_cold_numbers_are_the_streamer_s_own_from_when_it_was_told() -> None:
    model = make()
    model.prefill(lambda below: 0)
    for ids in model.cold.values():
        ids.fill_(0)  # whoever chose goes on with the same memory
    for layer in range(NUM_LAYERS):
        model.cold[layer] = torch.arange(N, F)
    model.correct(0, last)


def test_a_pass_that_met_a_read_error_does_not_disturb_the_next() -> None:
    model = make()
    model.prefill(last)
    model.copier.broken = True
    model.streamer.begin("correction", "cold", following="hot")
    model.streamer.attention(0)
    model.streamer.neurons(0)
    with pytest.raises(WeightReadError, match="broken"):
        model.streamer.cold_neurons(0)
    model.copier.broken = False
    model.draft()
    model.correct(2, last)
    model.correct(0, last)
    model.assert_sums_up()
    assert model.streamer.discarded_nbytes == 3 * COLD_NBYTES
