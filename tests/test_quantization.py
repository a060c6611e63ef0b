"""What the bytes of a quantised row are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.errors import ConfigError
from offload_sirius.quantization import GROUPS, KINDS, WeightFormat

FORMATS = [WeightFormat(kind=kind, group=group) for kind in KINDS for group in GROUPS]

ROWS = [
    # kind, group, width, where scales and the outlier begin, bytes of the row
    ("int8", 128, 4096, 4096, 4096 + 64, 4176),
    ("int8", 32, 40, 64, 64 + 4, 80),
    ("int4", 128, 4096, 2048, 2048 + 64, 2160),  # 2048 + 96 + 4
    ("int4", 128, 576, 288, 288 + 10, 320),  # 288 + 5 * 3 + 4 = 307
    ("int4", 32, 40, 32, 32 + 4, 48),
    ("int4", 64, 1, 16, 18, 32),
]


@pytest.mark.parametrize(("kind", "group", "width", "scales", "outlier", "nbytes"), ROWS)
def test_parts_of_a_row_written_out(kind: str, group: int, width: int, scales: int, outlier: int, nbytes: int) -> None:
    form = WeightFormat(kind=kind, group=group)  # type: ignore[arg-type]
    assert (form.integers_nbytes(width), form.outlier_offset(width), form.row_nbytes(width)) == (scales, outlier, nbytes)
    assert form.zeros_offset(width) == outlier + 4


@given(st.sampled_from(FORMATS), st.integers(1, 20000))
def test_a_row_holds_its_parts_and_less_than_16_bytes_more(form: WeightFormat, width: int) -> None:
    zeros_nbytes = form.num_groups(width) if form.kind == "int4" else 0
    end = form.zeros_offset(width) + zeros_nbytes
    assert end <= form.row_nbytes(width) < end + 16
    assert form.row_nbytes(width) % 16 == 0
    assert form.integers_nbytes(width) % 2 == 0, "scales are float16"
    assert 8 * form.integers_nbytes(width) >= form.bits * width


def test_the_layers_of_a_70b_model_take_the_bytes_that_are_expected() -> None:
    attention, feed_forward, num_layers = 150_994_944, 704_643_072, 80
    weights = num_layers * (attention + feed_forward)
    int4, int8 = WeightFormat(kind="int4", group=128), WeightFormat(kind="int8", group=128)
    assert weights * int4.bits_per_weight / 8 == pytest.approx(35.6e9, rel=0.01)
    assert weights * int8.bits_per_weight / 8 == pytest.approx(68.5e9, rel=0.02)
    # Rows of 8192 weights are long enough for an outlier and padding to be next to nothing.
    assert int4.row_nbytes(8192) * 8 / 8192 == pytest.approx(int4.bits_per_weight, rel=0.004)


def test_rows_too_wide_for_an_outlier_s_place_are_refused() -> None:
    form = WeightFormat(kind="int8", group=64)
    assert form.row_nbytes(65536) > 65536
    with pytest.raises(
        ConfigError, match="rows of 65537 weights cannot be quantised, only those of up to 65536; use --quantize none"
    ):
        form.row_nbytes(65537)


def test_bits_of_a_weight_include_its_share_of_scale_and_zero() -> None:
    assert WeightFormat(kind="int4", group=32).bits_per_weight == 4 + 24 / 32
    assert WeightFormat(kind="int8", group=64).bits_per_weight == 8 + 16 / 64


def test_unknown_kinds_and_groups_are_refused_with_what_is_known() -> None:
    with pytest.raises(ConfigError, match="weights of kind int3 are not known; known are int8, int4"):
        WeightFormat(kind="int3")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="groups of 48 weights are not known; known are 32, 64, 128"):
        WeightFormat(kind="int4", group=48)
