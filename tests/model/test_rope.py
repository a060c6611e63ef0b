from __future__ import annotations

import math

import pytest
import torch

from offload_sirius.model.costs import rotary_nbytes
from offload_sirius.model.rope import RotaryTable, rotate
from offload_sirius_loaders.spec import ModelSpec, RopeKind, RopeSpec

HEAD_DIM = 8
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def spec(kind: RopeKind = "default", **parameters: float) -> ModelSpec:
    return ModelSpec(
        name="test",
        architecture="llama",
        num_layers=1,
        width=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        ffn_width=8,
        vocab_size=16,
        max_positions=256,
        norm_eps=1e-5,
        rope=RopeSpec(kind=kind, theta=100.0, parameters=parameters),
        layer_windows=(None,),
    )


def table(model: ModelSpec, num_positions: int = 256, dtype: torch.dtype = torch.float32) -> RotaryTable:
    return RotaryTable(model, num_positions=num_positions, dtype=dtype, device=torch.device("cpu"))


def angles(rotary: RotaryTable, position: int) -> list[float]:
    """The angle each pair is turned by at a position, in (-pi, pi]."""
    cos, signed_sin = rotary.span(position, position + 1)
    half = HEAD_DIM // 2
    return torch.atan2(signed_sin[0, 0, half:], cos[0, 0, half:]).tolist()


def wrapped(angle: float) -> float:
    return math.atan2(math.sin(angle), math.cos(angle))


def test_pair_i_turns_by_theta_to_the_minus_2i_over_e_a_position() -> None:
    # theta 100, E 8: frequencies 1, 10^-0.5, 10^-1, 10^-1.5
    assert angles(table(spec()), 3) == pytest.approx([3.0, 0.948683, 0.3, 0.0948683], abs=1e-5)


def test_linear_scaling_divides_positions_by_the_factor() -> None:
    assert angles(table(spec("linear", factor=4.0)), 12) == pytest.approx(angles(table(spec()), 3), abs=1e-6)


def test_turning_is_the_product_with_a_complex_number() -> None:
    x = torch.randn(5, 3, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    x1, x2 = x.chunk(2, dim=-1)
    turns = torch.tensor([[wrapped(p * 100.0 ** (-i / 4)) for i in range(4)] for p in range(2, 7)])
    expected = torch.complex(x1, x2) * torch.polar(torch.ones_like(turns), turns)[:, None]

    turned = rotate(x, table(spec()).span(2, 7))

    assert (turned - torch.cat((expected.real, expected.imag), dim=-1)).abs().max() <= 1e-5


def test_turning_leaves_its_input_alone() -> None:
    x = torch.ones(2, 1, HEAD_DIM)

    rotate(x, table(spec()).span(5, 7))

    assert torch.equal(x, torch.ones(2, 1, HEAD_DIM))


def test_any_positions_turn_as_the_span_they_lie_in() -> None:
    rotary = table(spec())

    for gathered, span in zip(rotary.at(torch.tensor([4, 2, 4])), rotary.span(2, 5), strict=True):
        assert torch.equal(gathered, span[[2, 0, 2]])


def test_dynamic_turns_plainly_until_the_trained_length() -> None:
    rotary = table(spec("dynamic", factor=4.0))  # trained on 64
    rotary.begin(10)

    assert angles(rotary, 63) == pytest.approx(angles(table(spec()), 63), abs=1e-4)
    assert angles(rotary, 64) != pytest.approx(angles(table(spec()), 64), abs=1e-4)


@pytest.mark.parametrize(
    ("prompt_length", "position", "length"), [(10, 100, 101), (128, 100, 128), (128, 5, 128), (128, 128, 129)]
)
def test_dynamic_takes_the_length_at_which_a_position_was_computed(prompt_length: int, position: int, length: int) -> None:
    rotary = table(spec("dynamic", factor=4.0))
    rotary.begin(prompt_length)
    theta = 100.0 * (4.0 * length / 64 - 3.0) ** (8 / 6)

    assert angles(rotary, position) == pytest.approx([wrapped(position * theta ** (-i / 4)) for i in range(4)], abs=1e-4)


def test_a_new_sequence_settles_dynamic_anew() -> None:
    rotary = table(spec("dynamic", factor=4.0))
    rotary.begin(10)
    first = angles(rotary, 20)

    rotary.begin(200)
    assert angles(rotary, 20) != pytest.approx(first, abs=1e-4)

    rotary.begin(10)
    assert angles(rotary, 20) == first


def test_llama3_leaves_the_fast_pairs_and_slows_the_slow_ones_by_the_factor() -> None:
    # Wavelengths 6.3, 19.9, 62.8, 198.7; below 64/4 nothing changes, above 64/1 the factor applies, between them a blend.
    smooth = (64 / (2 * math.pi / 10**-0.5) - 1) / 3
    blended = 10**-0.5 * ((1 - smooth) / 8 + smooth)

    assert angles(table(spec("llama3", **LLAMA3)), 1)[:2] == pytest.approx([1.0, blended], abs=1e-5)
    assert angles(table(spec("llama3", **LLAMA3)), 1)[3] == pytest.approx(10**-1.5 / 8, abs=1e-5)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.8, "mscale_all_dim": 0.4}, (0.08 * math.log(4) + 1) / (0.04 * math.log(4) + 1)),
    ],
)
def test_yarn_scales_cosine_and_sine_by_its_attention_factor(parameters: dict[str, float], expected: float) -> None:
    cos, signed_sin = table(spec("yarn", **YARN, **parameters)).span(7, 8)

    assert (cos.square() + signed_sin.square()).sqrt().flatten().tolist() == pytest.approx([expected] * HEAD_DIM, abs=1e-5)


@pytest.mark.parametrize(("dtype", "element_nbytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_bill_is_what_the_table_weighs(dtype: torch.dtype, element_nbytes: int) -> None:
    assert table(spec(), 33, dtype).nbytes == rotary_nbytes(spec(), 33, element_nbytes) == 2 * 33 * 8 * element_nbytes
