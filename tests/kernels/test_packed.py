"""Views of quantised rows, and what they stand for, against a written-out reading of the bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.kernels.quantized import quantized_down, quantized_linear
from offload_sirius.quantization import GROUPS, KINDS, WeightFormat

FORMATS = [WeightFormat(kind=kind, group=group) for kind in KINDS for group in GROUPS]


def random_rows(num_rows: int, width: int, form: WeightFormat, gap: int = 0) -> QuantizedRows:
    """Random bytes with scales that are numbers; `gap` bytes between rows."""
    generator = torch.Generator().manual_seed(width)
    storage = torch.randint(0, 256, (num_rows, form.row_nbytes(width) + gap), dtype=torch.uint8, generator=generator)
    rows = QuantizedRows(storage[:, : form.row_nbytes(width)], width, form)
    rows.scales.copy_(torch.rand(num_rows, form.num_groups(width), generator=generator) * 0.01)
    rows.outlier_rests.copy_(torch.rand(num_rows, 1, generator=generator))
    rows.outlier_places.copy_(torch.randint(0, width, (num_rows, 1), generator=generator))
    if form.kind == "int8":
        rows.integers.clamp_(min=-127)
    return rows


def read_row(row: bytes, width: int, form: WeightFormat) -> list[float]:
    """A row by the text of quantization.py, weight by weight."""
    weights = []
    blocks, groups = -(-width // 32), -(-width // form.group)
    outlier, rest = struct.unpack_from("<He", row, (32 if form.kind == "int8" else 16) * blocks + 2 * groups)
    for index in range(width):
        group, block, place = index // form.group, index // 32, index % 32
        if form.kind == "int8":
            (scale,) = struct.unpack_from("<e", row, 32 * blocks + 2 * group)
            (integer,) = struct.unpack_from("<b", row, index)
            weights.append(integer * scale)
        else:
            (scale,) = struct.unpack_from("<e", row, 16 * blocks + 2 * group)
            zero = row[16 * blocks + 2 * groups + 4 + group] / 16
            both = row[16 * block + place % 16]
            weights.append(((both & 15 if place < 16 else both >> 4) - zero) * scale)
    weights[outlier] = float(np.float32(weights[outlier]) + np.float32(rest))
    return weights


def bytes_of(row: Tensor) -> bytes:
    return bytes(row.tolist())


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("width", [1, 31, 40, 128, 200])
def test_weights_are_what_the_bytes_say_exactly(form: WeightFormat, width: int) -> None:
    rows = random_rows(3, width, form, gap=48)
    expected = [read_row(bytes_of(row), width, form) for row in rows.rows]
    assert rows.dequantised().tolist() == expected


def test_writing_through_views_changes_the_bytes() -> None:
    form = WeightFormat(kind="int4", group=32)
    rows = QuantizedRows(torch.zeros(2, form.row_nbytes(40), dtype=torch.uint8), 40, form)
    rows.integers[1, 0] = 0x21
    rows.scales[1] = 0.5
    rows.zeros[1] = 8  # half a step
    weights = rows[1:].dequantised()
    assert weights.shape == (1, 40)
    assert weights[0, 0] == 0.25
    assert weights[0, 16] == 0.75
    assert weights[0, 1] == -0.25
    assert rows[:1].dequantised().count_nonzero() == 0


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_an_outlier_behind_the_end_is_nowhere(form: WeightFormat) -> None:
    rows = random_rows(3, 40, form)
    rows.outlier_places[1] = 40
    rows.outlier_places[2] = -1  # 65535
    assert torch.equal(rows.dequantised()[1:], rows.without_outliers()[1:])
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(quantized_linear(x, rows), x @ rows.dequantised().t(), atol=1e-5)
    assert torch.allclose(quantized_down(x[:, :3], rows), x[:, :3] @ rows.dequantised(), atol=1e-5)


def test_int8_has_no_zeros() -> None:
    rows = random_rows(1, 32, WeightFormat(kind="int8"))
    with pytest.raises(AssertionError):
        _ = rows.zeros
