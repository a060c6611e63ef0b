"""Hot and cold neurons together are the full model, and which are hot follows what neurons say."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from offload_sirius.kernels.matrix import combine
from offload_sirius.model.ops import gated_activations
from offload_sirius.sparsity.hot import HYSTERESIS, HotSet, exchanges
from offload_sirius.sparsity.prior import PSEUDO_TOKENS, NeuronPrior
from offload_sirius.weights.buffers import KeptNeurons
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.spec import ModelSpec

SPEC = open_checkpoint("synthetic:tiny?width=32&heads=4&kv_heads=2&ffn=20&layers=2").spec
LAYERS, F, D = SPEC.num_layers, SPEC.ffn_width, SPEC.width
CPU = torch.device("cpu")


class Source:
    """Layers of which it hands out hot neurons, from places of their own, and cold ones, in the order it was told."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (LAYERS, F, D)
        # Scaled, so that what neurons say is about as large as a model's.
        gate, up, down = ((torch.randn(shape, generator=generator) / D**0.5).to(dtype) for _ in range(3))
        self.layers = [KeptNeurons(gate[i], torch.stack((up[i], down[i]), dim=1)) for i in range(LAYERS)]
        self.hot: dict[int, KeptNeurons] = {}
        self.cold_order: dict[int, Tensor] = {}
        self.num_exchanged: list[int] = []
        self.num_swapped: list[int] = []
        self.prefilling = True

    def some(self, layer: int, ids: Tensor) -> KeptNeurons:
        whole = self.layers[layer]
        return KeptNeurons(whole.gate[ids], whole.up_down[ids])

    def neurons(self, layer: int) -> KeptNeurons:
        return self.layers[layer] if self.prefilling else self.hot[layer]

    def cold_neurons(self, layer: int) -> KeptNeurons:
        return self.some(layer, self.cold_order[layer])

    def choose(self, layer: int, hot_ids: Tensor, cold_ids: Tensor) -> None:
        self.hot[layer] = self.some(layer, hot_ids)
        self.cold_order[layer] = cold_ids.clone()

    def exchange(self, layer: int, hot_places: Tensor, cold_places: Tensor, cold_ids: Tensor) -> None:
        cold, hot = self.cold_neurons(layer), self.hot[layer]
        hot.gate[hot_places] = cold.gate[cold_places]
        hot.up_down[hot_places] = cold.up_down[cold_places]
        self.cold_order[layer] = cold_ids.clone()
        self.num_exchanged.append(len(hot_places))

    def swap(self, layer: int, places: Tensor, other_places: Tensor) -> None:
        for records in (self.hot[layer].gate, self.hot[layer].up_down):
            records[places], records[other_places] = records[other_places], records[places]
        self.num_swapped.append(len(places))


def z_of(source: Source, layer: int, x: Tensor) -> Tensor:
    whole = source.layers[layer]
    return functional.silu(x @ whole.gate.t()) * (x @ whole.up.t())


def shares_of(z: Tensor) -> Tensor:
    """The sum over tokens of (z_tj / ||z_t||)^2, token by token."""
    total = torch.zeros(z.shape[1], dtype=torch.float64)
    for row in z.double():
        if row.norm() > 0:
            total += (row / row.norm()) ** 2
    return total.float()


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed))


class Forgetful:
    """A prior's file, of which nobody wants to know."""

    def read(self, spec: ModelSpec) -> Tensor:
        return torch.zeros(spec.num_layers, spec.ffn_width)


def prior_of(sums: Tensor) -> NeuronPrior:
    prior = NeuronPrior(Forgetful(), SPEC, device=CPU)  # type: ignore[arg-type]
    prior.sums.copy_(sums)
    return prior


def prefilled(
    num_hot: int,
    decay: float | None = 0.7,
    seed: int = 1,
    *,
    num_drafted: int | None = None,
    prior: NeuronPrior | None = None,
) -> tuple[HotSet, Source]:
    source = Source()
    hot_set = HotSet(SPEC, source, num_hot, decay=decay, device=CPU)
    hot_set.begin(num_drafted or num_hot, prior)
    run(hot_set, source, hot_set.prefill, tokens(9, seed).split(4))
    return hot_set, source


def run(hot_set: HotSet, source: Source, feed_forward: object, chunks: Sequence[Tensor]) -> list[Tensor]:
    """A pass of all chunks, each layer by itself -> what each layer gives."""
    source.prefilling = feed_forward is hot_set.prefill
    found = []
    for layer in range(LAYERS):
        neurons = feed_forward.open(layer)  # type: ignore[attr-defined]
        found.append(torch.cat([neurons(chunk) for chunk in chunks]))
        feed_forward.close(layer)  # type: ignore[attr-defined]
    return found


def dense(source: Source, x: Tensor) -> list[Tensor]:
    return [z_of(source, layer, x) @ source.layers[layer].down for layer in range(LAYERS)]


def assert_is_partition(hot_set: HotSet, source: Source) -> None:
    """Every neuron is hot or cold, and its records are in its place."""
    for layer in range(LAYERS):
        hot, cold = hot_set.hot_ids(layer), hot_set.cold_ids(layer)
        assert sorted(hot.tolist() + cold.tolist()) == list(range(F))
        assert cold.tolist() == sorted(cold.tolist()) == source.cold_order[layer].tolist()
        whole, there = source.layers[layer], source.hot[layer]
        assert torch.equal(there.gate, whole.gate[hot])
        assert torch.equal(there.up_down, whole.up_down[hot])


# What passes compute.


@pytest.mark.parametrize("num_hot", [1, 2, 7, F // 2, F - 1])
@pytest.mark.parametrize("decay", [None, 0.0, 0.7])
@pytest.mark.parametrize("num_tokens", [1, 6])
def test_hot_and_cold_neurons_together_are_the_full_model(num_hot: int, decay: float | None, num_tokens: int) -> None:
    hot_set, source = prefilled(num_hot, decay)
    for seed in range(5):
        x = tokens(num_tokens, 100 + seed)
        for feed_forward in (hot_set.full, hot_set.correction):
            for found, expected in zip(run(hot_set, source, feed_forward, [x]), dense(source, x), strict=True):
                assert torch.allclose(found, expected, atol=1e-5)
        assert_is_partition(hot_set, source)


@settings(deadline=None, max_examples=40)
@example(data=None, num_hot=0)
@example(data=None, num_hot=F)
@given(data=st.data(), num_hot=st.integers(0, F))
def test_hot_and_cold_neurons_of_any_set_are_the_full_model(data: st.DataObject | None, num_hot: int) -> None:
    source = Source()
    hot_set = HotSet(SPEC, source, num_hot, decay=0.5, device=CPU)
    for layer in range(LAYERS):
        ids = torch.arange(F) if data is None else torch.tensor(data.draw(st.permutations(range(F))))
        hot_set.ids[layer] = torch.cat((ids[:num_hot], ids[num_hot:].sort().values))
        source.choose(layer, hot_set.hot_ids(layer), hot_set.cold_ids(layer))
    for seed in range(3):
        x = tokens(4, seed)
        found = run(hot_set, source, hot_set.correction, [x])
        assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found, dense(source, x), strict=True))
        assert_is_partition(hot_set, source)


@pytest.mark.parametrize("num_hot", [1, 7, F - 1])
def test_a_draft_computes_hot_neurons_and_no_others(num_hot: int) -> None:
    hot_set, source = prefilled(num_hot)
    run(hot_set, source, hot_set.correction, [tokens(5, 2)])
    x = tokens(3, 3)
    for layer, found in enumerate(run(hot_set, source, hot_set.draft, [x])):
        mask = torch.zeros(F)
        mask[hot_set.hot_ids(layer)] = 1
        assert torch.allclose(found, (z_of(source, layer, x) * mask) @ source.layers[layer].down, atol=1e-5)


def test_halves_are_summed_in_float32_where_the_dtype_is_short() -> None:
    source = Source(torch.bfloat16)
    hot_set = HotSet(SPEC, source, 9, decay=0.7, device=CPU)
    x = tokens(6, 1).bfloat16()
    run(hot_set, source, hot_set.prefill, [x])
    for layer, found in enumerate(run(hot_set, source, hot_set.full, [x])):
        hot, cold = source.hot[layer], source.cold_neurons(layer)
        z = [gated_activations(x, each, functional.silu) for each in (hot, cold)]
        halves = [combine(each, neurons.down) for each, neurons in zip(z, (hot, cold), strict=True)]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, (halves[0].float() + halves[1].float()).bfloat16())


# Which are hot.


@pytest.mark.parametrize("num_hot", [1, 7, F - 1])
def test_a_prompt_chooses_the_neurons_that_say_most_of_it_and_forgets_the_one_before(num_hot: int) -> None:
    hot_set, source = prefilled(num_hot)
    for seed in (1, 2):
        chunks = tokens(9, seed).split(4)
        run(hot_set, source, hot_set.prefill, chunks)
        assert_is_partition(hot_set, source)
        for layer in range(LAYERS):
            shares = shares_of(z_of(source, layer, torch.cat(chunks)))
            assert torch.allclose(hot_set.squared_scores[layer], shares, atol=1e-5)
            assert hot_set.hot_ids(layer).tolist() == sorted(shares.topk(num_hot).indices.tolist())


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.7, 0.99])
def test_the_statistic_is_that_of_the_formula_window_after_window(decay: float) -> None:
    hot_set, source = prefilled(7, decay)
    expected = [shares_of(z_of(source, layer, tokens(9, 1))) for layer in range(LAYERS)]
    for seed in range(20, 26):
        x = tokens(5, seed)
        run(hot_set, source, hot_set.correction, [x])
        for layer in range(LAYERS):
            expected[layer] = decay * expected[layer] + shares_of(z_of(source, layer, x))
            assert torch.allclose(hot_set.squared_scores[layer], expected[layer], atol=1e-5)
        assert_is_partition(hot_set, source)
    assert hot_set.num_exchanged == sum(source.num_exchanged) > 0


@settings(deadline=None, max_examples=60)
@given(seeds=st.lists(st.integers(0, 999), min_size=1, max_size=5), num_hot=st.integers(1, F - 1), decay=st.floats(0, 0.99))
def test_after_a_refresh_no_cold_neuron_is_better_than_a_hot_one_by_more_than_the_hysteresis(
    seeds: list[int], num_hot: int, decay: float
) -> None:
    hot_set, source = prefilled(num_hot, decay)
    for seed in seeds:
        run(hot_set, source, hot_set.correction, [tokens(1 + seed % 4, seed)])
        assert_is_partition(hot_set, source)
        for layer in range(LAYERS):
            scores = hot_set.squared_scores[layer]
            hot, cold = scores[hot_set.hot_ids(layer)], scores[hot_set.cold_ids(layer)]
            assert cold.max() <= hot.min() * (1 + HYSTERESIS)


def test_full_passes_and_drafts_leave_set_and_statistic_as_they_are() -> None:
    hot_set, source = prefilled(7)
    ids, scores = hot_set.ids.clone(), hot_set.squared_scores.clone()
    for feed_forward in (hot_set.full, hot_set.draft):
        run(hot_set, source, feed_forward, [tokens(8, 77)])
    assert torch.equal(hot_set.ids, ids)
    assert torch.equal(hot_set.squared_scores, scores)


def test_of_tokens_that_are_not_to_be_heard_nothing_is_learnt() -> None:
    x = tokens(6, 3)
    found, squared = [], []
    for num_unheard, rows in ((2, x), (0, x[:4])):
        prior = prior_of(torch.zeros(LAYERS, F))
        hot_set, source = prefilled(F // 2, prior=prior)
        hot_set.heard = torch.tensor([1.0] * 4 + [0.0] * num_unheard) if num_unheard else None
        found.append(run(hot_set, source, hot_set.correction, [rows]))
        squared.append((hot_set.squared_scores, prior.sums))
    assert all(torch.allclose(six[:4], four, atol=1e-6) for six, four in zip(*found, strict=True)), "but they are computed"
    for six, four in zip(*squared, strict=True):
        assert torch.allclose(six, four, atol=1e-6)


def test_without_refresh_the_set_stays_as_the_prompt_chose_it() -> None:
    hot_set, source = prefilled(7, None)
    ids = hot_set.ids.clone()
    for seed in range(5):
        run(hot_set, source, hot_set.correction, [tokens(8, seed)])
    assert torch.equal(hot_set.ids, ids)
    assert (hot_set.num_exchanged, source.num_exchanged) == (0, [])


def test_a_window_of_which_no_neuron_says_anything_moves_none() -> None:
    hot_set, source = prefilled(7)
    ids = hot_set.ids.clone()
    for _ in range(200):  # the statistic decays to nothing
        run(hot_set, source, hot_set.correction, [torch.zeros(3, D)])
    assert torch.equal(hot_set.ids, ids)


# Drafts that compute fewer neurons than are hot.


@pytest.mark.parametrize(("num_drafted", "num_hot"), [(1, 2), (1, F - 1), (3, 7), (6, 7), (9, 12)])
def test_a_draft_of_fewer_computes_those_that_the_prompt_chose_first_and_no_others(num_drafted: int, num_hot: int) -> None:
    hot_set, source = prefilled(num_hot, num_drafted=num_drafted)
    x = tokens(3, 3)
    for layer, found in enumerate(run(hot_set, source, hot_set.draft, [x])):
        shares = shares_of(z_of(source, layer, torch.cat(tokens(9, 1).split(4))))
        best = shares.topk(num_drafted).indices
        mask = torch.zeros(F).index_fill_(0, best, 1)
        assert torch.allclose(found, (z_of(source, layer, x) * mask) @ source.layers[layer].down, atol=1e-5)
        hot = hot_set.hot_ids(layer).tolist()
        assert hot[:num_drafted] == sorted(best.tolist())
        assert hot[num_drafted:] == sorted(set(shares.topk(num_hot).indices.tolist()) - set(best.tolist()))
    assert_is_partition(hot_set, source)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), seeds=st.lists(st.integers(0, 999), min_size=1, max_size=5), decay=st.floats(0, 0.99))
def test_after_a_refresh_the_best_hot_neurons_stand_in_front_and_are_what_a_draft_computes(
    data: st.DataObject, seeds: list[int], decay: float
) -> None:
    num_hot = data.draw(st.integers(2, F - 1))
    num_drafted = data.draw(st.integers(1, num_hot - 1))
    hot_set, source = prefilled(num_hot, decay, num_drafted=num_drafted)
    for seed in seeds:
        x = tokens(1 + seed % 4, seed)
        found = run(hot_set, source, hot_set.correction, [x])
        assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(found, dense(source, x), strict=True))
        assert_is_partition(hot_set, source)
        drafted = run(hot_set, source, hot_set.draft, [x])
        for layer in range(LAYERS):
            scores, hot = hot_set.squared_scores[layer], hot_set.hot_ids(layer)
            front, back = scores[hot[:num_drafted]], scores[hot[num_drafted:]]
            assert back.max() <= front.min() * (1 + HYSTERESIS)
            assert scores[hot_set.cold_ids(layer)].max() <= scores[hot].min() * (1 + HYSTERESIS)
            mask = torch.zeros(F).index_fill_(0, hot[:num_drafted], 1)
            expected = (z_of(source, layer, x) * mask) @ source.layers[layer].down
            assert torch.allclose(drafted[layer], expected, atol=1e-5)


def test_neurons_go_to_the_front_as_windows_need_them() -> None:
    hot_set, source = prefilled(12, num_drafted=4)
    for seed in range(10):
        run(hot_set, source, hot_set.correction, [tokens(5, seed)])
    assert sum(source.num_swapped) > 0
    assert hot_set.num_exchanged == sum(source.num_exchanged), "what changes places on the device alone is not counted"


def test_each_answer_has_its_own_number_of_drafted_neurons() -> None:
    hot_set, source = prefilled(12, num_drafted=4)
    for num_drafted in (12, 1, 7):
        hot_set.begin(num_drafted, None)
        run(hot_set, source, hot_set.prefill, [tokens(9, 2)])
        expected = prefilled(12, num_drafted=num_drafted, seed=2)
        assert torch.equal(hot_set.ids, expected[0].ids)
        for seed in range(3):
            for ours, theirs in zip(
                run(hot_set, source, hot_set.draft, [tokens(2, seed)]),
                run(*expected, expected[0].draft, [tokens(2, seed)]),
                strict=True,
            ):
                assert torch.equal(ours, theirs)


# What earlier answers say.


@pytest.mark.parametrize("num_seen", [0, 10, 1000])
def test_the_prior_is_added_to_what_the_prompt_says_and_decays_with_it(num_seen: int) -> None:
    drawn = torch.rand(LAYERS, F, generator=torch.Generator().manual_seed(4))
    sums = drawn / drawn.sum(dim=1, keepdim=True) * num_seen
    hot_set, source = prefilled(7, 0.5, prior=prior_of(sums))
    pseudo = sums * (min(num_seen, PSEUDO_TOKENS) / max(num_seen, 1))
    window = tokens(5, 20)
    for layer in range(LAYERS):
        expected = shares_of(z_of(source, layer, torch.cat(tokens(9, 1).split(4)))) + pseudo[layer]
        assert torch.allclose(hot_set.squared_scores[layer], expected, atol=1e-4)
        assert set(hot_set.hot_ids(layer).tolist()) == set(expected.topk(7).indices.tolist())
    before = hot_set.squared_scores.clone()
    run(hot_set, source, hot_set.correction, [window])
    for layer in range(LAYERS):
        expected = before[layer] * 0.5 + shares_of(z_of(source, layer, window))
        assert torch.allclose(hot_set.squared_scores[layer], expected, atol=1e-4)


@pytest.mark.parametrize("num_hot", [1, 7, F - 1])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_the_prior_learns_windows_that_are_corrected_and_nothing_else(decay: float | None, num_hot: int) -> None:
    prior = prior_of(torch.zeros(LAYERS, F))
    hot_set, source = prefilled(num_hot, decay, prior=prior)
    seen = []
    for seed in range(20, 24):
        run(hot_set, source, hot_set.correction, [tokens(5, seed)])
        seen.append(tokens(5, seed))
        for feed_forward in (hot_set.draft, hot_set.full):
            run(hot_set, source, feed_forward, [tokens(3, 99)])
    for layer in range(LAYERS):
        assert torch.allclose(prior.sums[layer], shares_of(z_of(source, layer, torch.cat(seen))), atol=1e-4)
        assert float(prior.sums[layer].sum()) == pytest.approx(20, rel=1e-4)


def test_an_answer_that_shall_not_depend_on_others_neither_hears_nor_teaches_the_prior() -> None:
    prior = prior_of(torch.rand(LAYERS, F) * 100)
    kept = prior.sums.clone()
    hot_set, source = prefilled(7, prior=prior)
    assert torch.equal(prior.sums, kept)
    hot_set.begin(7, None)
    run(hot_set, source, hot_set.prefill, tokens(9, 1).split(4))
    run(hot_set, source, hot_set.correction, [tokens(5, 2)])
    expected, other = prefilled(7)
    run(expected, other, expected.correction, [tokens(5, 2)])
    assert torch.equal(hot_set.ids, expected.ids)
    assert torch.equal(hot_set.squared_scores, expected.squared_scores)
    assert torch.equal(prior.sums, kept)


# Who changes places with whom.


@pytest.mark.parametrize(
    ("hot", "cold", "hot_places", "cold_places"),
    [
        ([5.0, 1.0, 3.0], [2.0, 0.5], [1], [0]),
        ([5.0, 1.0, 3.0], [4.0, 9.0], [1, 2], [1, 0]),
        ([5.0, 4.0], [3.0, 2.0], [], []),
        ([1.0, 1.0, 1.0], [1.0, 1.0], [], []),  # ties
        ([1.0, 1.0], [1.09, 1.05], [], []),  # better, but not by enough
        ([1.0, 1.0], [1.11, 1.05], [0], [0]),
        ([1.0, 1.0], [1.05, 1.2, 1.2], [0, 1], [1, 2]),  # of equals the first
        ([0.0, 0.0, 2.0], [0.0, 0.0], [], []),  # nothing is not better than nothing
        ([0.0, 0.0, 2.0], [1e-30, 0.0], [0], [0]),
        ([1.0], [3.0, 9.0, 2.0], [0], [1]),  # one place for many
        ([3.0, 1.0, 2.0], [9.0], [1], [0]),  # many places for one
        ([1.0, 2.0, 3.0, 4.0], [9.0, 2.3, 2.1], [0, 1], [0, 1]),
    ],
)
def test_the_worst_hot_neurons_make_room_for_the_best_cold_ones_that_are_better_by_enough(
    hot: list[float], cold: list[float], hot_places: list[int], cold_places: list[int]
) -> None:
    found = exchanges(torch.tensor(hot), torch.tensor(cold))
    assert [each.tolist() for each in found] == [hot_places, cold_places]


@given(hot=st.lists(st.floats(0, 100, width=32), min_size=1), cold=st.lists(st.floats(0, 100, width=32), min_size=1))
def test_what_has_changed_places_does_not_change_back(hot: list[float], cold: list[float]) -> None:
    hot_scores, cold_scores = torch.tensor(hot), torch.tensor(cold)
    before = torch.cat((hot_scores, cold_scores)).sort().values
    hot_places, cold_places = exchanges(hot_scores, cold_scores)
    hot_scores[hot_places], cold_scores[cold_places] = cold_scores[cold_places], hot_scores[hot_places]
    assert torch.equal(torch.cat((hot_scores, cold_scores)).sort().values, before)
    assert [len(each) for each in exchanges(hot_scores, cold_scores)] == [0, 0]
