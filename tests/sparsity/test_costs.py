"""What a draft step takes, by the figures of the paper and by hand."""

from __future__ import annotations

import pytest

from offload_sirius.config import DecodingConfig
from offload_sirius.sparsity.costs import draft_density, num_parameters, sparsity_nbytes
from offload_sirius_loaders import open_checkpoint

LLAMA_8B = open_checkpoint("synthetic:llama-3-8b").spec
LLAMA_70B = open_checkpoint("synthetic:llama-3-70b").spec


def test_parameters_are_those_that_were_published() -> None:
    assert num_parameters(LLAMA_70B) == 70_553_706_496
    assert num_parameters(LLAMA_8B) == 8_030_261_248


@pytest.mark.parametrize(
    ("sparsity", "keep", "density"),
    [("griffin", 0.5, 0.65), ("cats", 0.5, 0.76), ("griffin", 0.4, 0.58), ("cats", 0.4, 0.72), ("griffin", 1, 1), ("cats", 1, 1)],
)
def test_densities_of_llama_3_8b_are_those_of_the_paper(sparsity: str, keep: float, density: float) -> None:
    # The paper gives two digits, some rounded and some cut off: .649, .766, .579 and .719 in full.
    found = draft_density(LLAMA_8B, DecodingConfig(sparsity=sparsity, keep=keep))  # type: ignore[arg-type]
    assert density - 0.005 <= found < density + 0.01


def test_density_by_hand() -> None:
    spec = open_checkpoint("synthetic:tiny").spec  # 4 layers of 176 neurons of width 64, of which 88 are dropped
    for sparsity, matrices in (("griffin", 3), ("cats", 2)):
        found = draft_density(spec, DecodingConfig(sparsity=sparsity))  # type: ignore[arg-type]
        assert found == 1 - 4 * 88 * 64 * matrices / num_parameters(spec)


@pytest.mark.parametrize(("draft_keep", "num_hot", "keep"), [(0.25, 88, 0.25), (0.25, 22, 0.125), (None, 88, 0.5)])
def test_drafts_are_as_dense_as_the_resident_neurons_that_they_compute(
    draft_keep: float | None, num_hot: int, keep: float
) -> None:
    spec = open_checkpoint("synthetic:tiny").spec
    found = draft_density(spec, DecodingConfig(draft_keep=draft_keep), num_hot)
    assert found == draft_density(spec, DecodingConfig(keep=keep))


@pytest.mark.parametrize(
    ("settings", "nbytes"),
    [
        ({"mode": "full"}, 0),
        ({"keep": 1}, 0),
        ({"sparsity": "griffin"}, 80 * 28672 * (4 + 2)),
        ({"draft": "resident"}, 80 * 28672 * (4 + 8 + 4)),
        ({"draft": "resident", "prior": False}, 80 * 28672 * (4 + 8)),
        ({"draft": "resident", "mode": "sparse"}, 80 * 28672 * (4 + 8)),
        ({"draft": "resident", "draft_keep": 0.25}, 80 * 28672 * (4 + 8 + 4)),
        ({"sparsity": "cats"}, 0),
        ({"sparsity": "cats", "cats_threshold": "auto"}, 80 * 4),
        ({"sparsity": "cats", "cats_threshold": 0.1, "mode": "sparse"}, 80 * 4),
    ],
    ids=str,
)
def test_choosing_neurons_takes_a_score_and_a_mask_a_neuron_or_a_number_a_layer(settings: dict[str, object], nbytes: int) -> None:
    assert sparsity_nbytes(LLAMA_70B, DecodingConfig(**settings), 2) == nbytes  # type: ignore[arg-type]
