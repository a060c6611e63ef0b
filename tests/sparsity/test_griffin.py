"""The statistic of coarse sparsity, against its formula written plainly, and what becomes of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from offload_sirius.sparsity.griffin import Griffin, add_squared_scores, largest
from offload_sirius.weights.buffers import KeptNeurons
from offload_sirius_loaders import open_checkpoint

SPEC = open_checkpoint("synthetic:tiny?width=32&heads=4&kv_heads=2&ffn=20&layers=2").spec


def scores_of(z: Tensor) -> Tensor:
    """s_j = || [ z_tj / ||z_t|| ]_t ||, token by token; one that says nothing counts for nothing."""
    scores = []
    for j in range(z.shape[1]):
        shares = [float(row[j] / row.norm()) for row in z.double() if row.norm() > 0]
        scores.append(sum(share**2 for share in shares) ** 0.5)
    return torch.tensor(scores)


@settings(deadline=None, max_examples=50)
@given(num_tokens=st.integers(1, 12), num_neurons=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_scores_are_those_of_the_formula_whatever_the_chunks(
    num_tokens: int, num_neurons: int, seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(num_tokens, num_neurons, generator=generator)
    z *= 10.0 ** torch.randint(-6, 7, (num_tokens, 1), generator=generator)  # loud tokens weigh no more than quiet ones
    z[data.draw(st.sets(st.integers(0, num_tokens - 1)).map(sorted))] = 0
    squared = torch.zeros(num_neurons)
    cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens))))
    for start, stop in zip([0, *cuts], [*cuts, num_tokens], strict=True):
        add_squared_scores(squared, z[start:stop])
    assert torch.allclose(squared.sqrt(), scores_of(z), atol=1e-5)


def test_a_token_of_which_no_neuron_says_anything_adds_nothing() -> None:
    squared = torch.tensor([1.0, 2.0])
    add_squared_scores(squared, torch.zeros(3, 2))
    assert squared.tolist() == [1.0, 2.0]


def test_scores_are_summed_in_float32_whatever_the_activations_are() -> None:
    squared = torch.zeros(2)
    for _ in range(1000):  # in bfloat16 a sum of halves would stop at 256
        add_squared_scores(squared, torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16))
    assert squared.tolist() == pytest.approx([500.0, 500.0], rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [
        ([3.0, 1.0, 2.0], 2, [0, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [0, 1]),
        ([0.0, 5.0, 1.0, 5.0, 1.0], 3, [1, 2, 3]),
        ([0.0, 0.0], 1, [0]),
    ],
)
def test_the_largest_are_kept_in_order_and_of_equals_the_first(scores: list[float], count: int, kept: list[int]) -> None:
    assert largest(torch.tensor(scores), count).tolist() == kept


class Source:
    """Layers that are all there, and what it was told to keep; from then on it hands out those alone, where it may."""

    def __init__(self, *, slices: bool) -> None:
        generator = torch.Generator().manual_seed(5)
        shape = (SPEC.num_layers, SPEC.ffn_width, SPEC.width)
        self.layers = [
            KeptNeurons(gate, torch.stack((up, down), dim=1))
            for gate, up, down in zip(*(torch.randn(shape, generator=generator) for _ in range(3)), strict=True)
        ]
        self.kept: dict[int, Tensor] = {}
        self.slices = slices
        self.drafting = False

    def neurons(self, layer: int) -> KeptNeurons:
        whole = self.layers[layer]
        if not (self.slices and self.drafting):
            return whole
        ids = self.kept[layer]
        return KeptNeurons(whole.gate[ids], whole.up_down[ids])

    def keep(self, layer: int, neuron_ids: Tensor) -> None:
        self.kept[layer] = neuron_ids


def z_of(source: Source, layer: int, x: Tensor) -> Tensor:
    whole = source.layers[layer]
    return functional.silu(x @ whole.gate.t()) * (x @ whole.up.t())


@pytest.mark.parametrize("slices", [False, True])
def test_a_prompt_is_computed_in_full_and_chooses_what_drafts_compute(slices: bool) -> None:
    source = Source(slices=slices)
    griffin = Griffin(SPEC, source, 7, dtype=torch.float32, device=torch.device("cpu"))
    for prompt_seed in (1, 2):  # the second prompt forgets the first
        chunks = torch.randn(9, SPEC.width, generator=torch.Generator().manual_seed(prompt_seed)).split(4)
        source.drafting = False
        for layer in range(SPEC.num_layers):
            neurons = griffin.prefill.open(layer)
            for chunk in chunks:
                expected = z_of(source, layer, chunk) @ source.layers[layer].down
                assert torch.allclose(neurons(chunk), expected, atol=1e-3)
            griffin.prefill.close(layer)
            scores = scores_of(z_of(source, layer, torch.cat(chunks)))
            assert source.kept[layer].tolist() == sorted(scores.topk(7).indices.tolist())
        source.drafting = True
        x = torch.randn(2, SPEC.width, generator=torch.Generator().manual_seed(9))
        for layer in range(SPEC.num_layers):
            mask = torch.zeros(SPEC.ffn_width)
            mask[source.kept[layer]] = 1
            expected = (z_of(source, layer, x) * mask) @ source.layers[layer].down
            assert torch.allclose(griffin.draft.open(layer)(x), expected, atol=1e-3)
            griffin.draft.close(layer)
