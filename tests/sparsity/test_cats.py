"""The choice of fine sparsity, token by token, and that fetching and caching give what computing all and masking gives."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from offload_sirius.sparsity.cats import CALIBRATION_ROWS, Cats, FetchCounts, reached_by
from offload_sirius.weights.buffers import KeptNeurons
from offload_sirius.weights.neuron_cache import NeuronCache
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:tiny?width=32&heads=4&kv_heads=2&ffn=20&layers=2").spec
F, D = SPEC.ffn_width, SPEC.width


@dataclass
class Fetched:
    records: Tensor

    def wait(self) -> Tensor:
        return self.records


class Source:
    """Layers of which all is there, or (whole=False) the gates, and records that were asked for."""

    def __init__(self, *, whole: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (SPEC.num_layers, F, D)
        self.layers = [
            KeptNeurons(gate, torch.stack((up, down), dim=1))
            for gate, up, down in zip(*(torch.randn(shape, generator=generator) for _ in range(3)), strict=True)
        ]
        self.whole = whole
        self.fetched: list[list[int]] = []

    def neurons(self, layer: int) -> KeptNeurons:
        all_of_it = self.layers[layer]
        return all_of_it if self.whole else KeptNeurons(all_of_it.gate, torch.full_like(all_of_it.up_down, torch.nan))

    def has_records(self, layer: int) -> bool:
        return self.whole

    def fetch(self, layer: int, neuron_ids: Tensor) -> Fetched:
        assert not self.whole
        assert len(neuron_ids) > 0, "nothing is not worth a copy"
        self.fetched.append(neuron_ids.tolist())
        return Fetched(self.layers[layer].up_down[neuron_ids])


def masked(source: Source, layer: int, x: Tensor, num_kept: int) -> Tensor:
    """All neurons, those that are not kept at zero."""
    whole = source.layers[layer]
    gates = functional.silu(x @ whole.gate.t())
    mask = torch.zeros(F)
    mask[gates.abs().sum(dim=0).topk(num_kept).indices] = 1
    return (gates * mask * (x @ whole.up.t())) @ whole.down


def cats_of(source: Source, num_kept: int = 7, *, num_cached: int = 0, **more: object) -> Cats:
    caches = {layer: NeuronCache(torch.zeros(num_cached, 2, D), F) for layer in range(SPEC.num_layers) if num_cached}
    return Cats(SPEC, source, num_kept, caches=caches, **more)  # type: ignore[arg-type]


def test_the_largest_gates_are_kept_whatever_their_sign() -> None:
    gates = torch.zeros(1, F)
    gates[0, [2, 5, 11]] = torch.tensor([-3.0, 1.0, 2.0])
    assert cats_of(Source(whole=True), 2).needed(0, gates).nonzero().flatten().tolist() == [2, 11]


def test_several_tokens_keep_one_set_by_the_sum_of_their_gates() -> None:
    gates = torch.zeros(2, F)
    gates[0, 1], gates[1, 2] = 5.0, -5.0
    gates[:, 3] = torch.tensor([4.0, -4.0])  # 8 together, though it is nobody's largest
    kept = [cats_of(Source(whole=True), count).needed(0, gates).nonzero().flatten().tolist() for count in (1, 3)]
    assert kept == [[3], [1, 2, 3]]


def test_a_threshold_keeps_what_reaches_it_however_many_that_are() -> None:
    cats = cats_of(Source(whole=True), thresholds=torch.tensor([0.5, 2.0]))
    gates = torch.zeros(1, F)
    gates[0, :4] = torch.tensor([0.4, -0.5, 0.6, 3.0])
    assert cats.needed(0, gates).nonzero().flatten().tolist() == [1, 2, 3]
    assert cats.needed(1, gates).nonzero().flatten().tolist() == [3]
    two_tokens = torch.cat((gates, torch.zeros(1, F)))  # by their mean
    assert cats.needed(0, two_tokens).nonzero().flatten().tolist() == [3]
    assert not cats.needed(1, torch.zeros(1, F)).any()


@settings(deadline=None, max_examples=60)
@given(
    num_cached=st.sampled_from([0, 1, 4, 7, 12, F]),
    rows=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    num_kept=st.integers(1, F - 1),
    seed=st.integers(0, 999),
)
def test_fetched_and_cached_neurons_add_up_to_the_masked_model(
    num_cached: int, rows: list[int], num_kept: int, seed: int
) -> None:
    source = Source(whole=False)
    cats = cats_of(source, num_kept, num_cached=num_cached)
    generator = torch.Generator().manual_seed(seed)
    for num_rows in rows:
        x = torch.randn(num_rows, D, generator=generator)
        for layer in range(SPEC.num_layers):
            found = cats.draft.open(layer)(x)
            cats.draft.close(layer)
            assert torch.allclose(found, masked(source, layer, x, num_kept), atol=1e-3)
    assert cats.counts.needed == len(rows) * SPEC.num_layers * num_kept
    assert cats.counts.missing == sum(len(each) for each in source.fetched)
    if num_cached == 0:
        assert cats.counts.missing == cats.counts.needed


def test_where_all_records_are_there_none_is_fetched() -> None:
    source = Source(whole=True)
    cats = cats_of(source)
    x = torch.randn(2, D)
    assert torch.allclose(cats.draft.open(1)(x), masked(source, 1, x, 7), atol=1e-3)
    assert (source.fetched, cats.counts) == ([], FetchCounts())


def test_what_a_token_needed_is_there_for_the_next_one() -> None:
    source = Source(whole=False)
    cats = cats_of(source, num_cached=7)
    x = torch.randn(1, D)
    first, second = (cats.draft.open(0)(x) for _ in range(2))
    assert torch.allclose(first, second, atol=1e-4)
    assert [len(each) for each in source.fetched] == [7]
    assert cats.counts.hit_share == 0.5


def test_where_nothing_is_needed_there_is_no_share() -> None:
    assert FetchCounts().hit_share is None
    source = Source(whole=False)
    cats = cats_of(source, num_cached=3, thresholds=torch.full((2,), 1e9))
    assert cats.draft.open(0)(torch.randn(1, D)).count_nonzero() == 0
    assert (source.fetched, cats.counts.hit_share) == ([], None)


def test_calibration_computes_all_neurons_and_finds_the_gate_that_the_share_reaches() -> None:
    source = Source(whole=True)
    cats = cats_of(source, num_kept=5, thresholds=torch.zeros(2), calibrate=True)
    assert cats.prefill is not None
    x = torch.randn(30, D)
    for chunks in ([x], list(x.split(30)), [x]):  # each prompt anew
        neurons = cats.prefill.open(0)
        for chunk in chunks:
            whole = source.layers[0]
            gates = functional.silu(chunk @ whole.gate.t())
            assert torch.allclose(neurons(chunk), (gates * (chunk @ whole.up.t())) @ whole.down, atol=1e-3)
        cats.prefill.close(0)
        gates = functional.silu(x @ source.layers[0].gate.t()).abs()
        assert (gates >= cats.thresholds[0]).sum() == 30 * 5  # type: ignore[index]
    assert cats.thresholds[1] == 0  # type: ignore[index]


def test_chunks_count_by_their_tokens() -> None:
    source = Source(whole=True)
    cats = cats_of(source, num_kept=5, thresholds=torch.zeros(2), calibrate=True)
    assert cats.prefill is not None
    chunks = torch.randn(30, D).split([20, 10])
    neurons = cats.prefill.open(0)
    for chunk in chunks:
        neurons(chunk)
    cats.prefill.close(0)
    quantiles = [reached_by(functional.silu(chunk @ source.layers[0].gate.t()), 0.25) for chunk in chunks]
    assert cats.thresholds is not None
    assert float(cats.thresholds[0]) == pytest.approx(float((20 * quantiles[0] + 10 * quantiles[1]) / 30))


@pytest.mark.parametrize(
    ("gates", "share", "reached"),
    [
        ([[1.0, -4.0, 2.0, 3.0]], 0.5, 3.0),
        ([[1.0, -4.0, 2.0, 3.0]], 0.25, 4.0),
        ([[1.0, -4.0, 2.0, 3.0]], 0.001, 4.0),
        ([[1.0, -4.0], [2.0, 3.0]], 0.75, 2.0),
    ],
)
def test_a_share_of_gates_reaches_a_size(gates: list[list[float]], share: float, reached: float) -> None:
    assert float(reached_by(torch.tensor(gates), share)) == reached


def test_of_many_tokens_some_are_looked_at_evenly_spread() -> None:
    gates = torch.zeros(3 * CALIBRATION_ROWS, 2)
    gates[::3] = 1.0
    assert float(reached_by(gates, 1.0)) == 1.0
