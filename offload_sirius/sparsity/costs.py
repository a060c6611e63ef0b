"""What a draft step takes: its share of the model's parameters, and the device bytes that choosing neurons needs. No torch."""

from __future__ import annotations

from math import prod

from offload_sirius.config import DecodingConfig, Sparsity
from offload_sirius_loaders.spec import ModelSpec

MATRICES_OF_A_NEURON: dict[Sparsity, int] = {"griffin": 3, "cats": 2}
"""Rows and columns that a dropped neuron saves: gate, up and down, or all but the gate, by which it is chosen."""

FOUND_AT_LEAST, FOUND_MORE_BY_KEPT = 0.3, 0.6
"""Of the neurons that a token needs, those found in a cache of as many: 0.3 + 0.6 * N / F. SmolLM2-135M finds .45, .59 and .76 of
them where it keeps a quarter, a half and three quarters of all. Beforehand nobody knows: the gates of the token decide."""


def num_parameters(spec: ModelSpec) -> int:
    """Of the whole model, embedding and head included."""
    layer = sum(prod(shape) for shape in spec.layer_roles().values())
    return sum(prod(shape) for shape in spec.model_roles().values()) + spec.num_layers * layer


def draft_density(spec: ModelSpec, decoding: DecodingConfig, num_hot: int | None = None) -> float:
    """Share of all parameters that a draft step uses, as the paper counts density.

    num_hot: N where that is what the device has room for; None: as many as are asked for.

    saved = layers * (F - N) * D * rows and columns of a neuron        M instead of N where drafts compute fewer than are resident
    """
    num_used = decoding.num_kept(spec.ffn_width) if num_hot is None else decoding.num_drafted(spec.ffn_width, num_hot)
    saved = (
        spec.num_layers
        * (spec.ffn_width - num_used)
        * spec.width
        * MATRICES_OF_A_NEURON[decoding.sparsity]
    )  # fmt: skip
    return 1 - saved / num_parameters(spec)


def sparsity_nbytes(spec: ModelSpec, decoding: DecodingConfig, element_nbytes: int) -> int:
    """Device bytes that choosing neurons keeps: griffin has a score and a mask a neuron, cats a threshold a layer."""
    keeps_all = decoding.draft_format is None and decoding.num_kept(spec.ffn_width) == spec.ffn_width
    if not decoding.drafts or keeps_all:
        return 0
    if decoding.draft == "resident":
        neuron_nbytes = (
            4  # score, in float32
            + 8  # neurons by place, as int64
            + (4 if decoding.with_prior else 0)  # what earlier runs say, in float32
        )
        numbers = 0 if decoding.draft_format is None else 8 * spec.ffn_width  # of all neurons, once
        return spec.num_layers * spec.ffn_width * neuron_nbytes + numbers
    if decoding.sparsity == "griffin":
        return spec.num_layers * spec.ffn_width * (4 + element_nbytes)
    return spec.num_layers * 4 if decoding.cats_threshold is not None else 0


def num_fetched(num_needed: int, num_cached: int, num_neurons: int) -> int:
    """Neurons of a layer whose records a fine draft step is expected to send for. num_cached: the cache's; one of fewer than are
    needed is taken to find proportionally less."""
    found_share = FOUND_AT_LEAST + FOUND_MORE_BY_KEPT * num_needed / num_neurons
    return num_needed - int(found_share * min(num_cached, num_needed))
