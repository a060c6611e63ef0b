"""Quantised rows as tensors: views of their parts, and the weights that they stand for in plain torch. Knows no layers."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_sirius.quantization import BLOCK, ZERO_STEPS, WeightFormat


def integers_of(rows: Tensor, width: int, form: WeightFormat) -> Tensor:
    """rows uint8 [N, row_nbytes], strided -> where their integers are: a view, int8 [N, ...] or uint8 [N, .../2] for int4."""
    integers = rows[:, : form.integers_nbytes(width)]
    return integers.view(torch.int8) if form.kind == "int8" else integers


def scales_of(rows: Tensor, width: int, form: WeightFormat) -> Tensor:
    """A view, float16 [N, groups]."""
    return rows[:, form.integers_nbytes(width) : form.zeros_offset(width)].view(torch.float16)


def zeros_of(rows: Tensor, width: int, form: WeightFormat) -> Tensor:
    """A view of int4's, uint8 [N, groups], in sixteenths."""
    assert form.kind == "int4", form
    start = form.zeros_offset(width)
    return rows[:, start : start + form.num_groups(width)]


def dequantise_rows(rows: Tensor, width: int, form: WeightFormat) -> Tensor:
    """rows uint8 [N, row_nbytes], strided -> the weights that they stand for, float32 [N, width], exactly."""
    scales = scales_of(rows, width, form).float()
    integers = integers_of(rows, width, form)
    if form.kind == "int8":
        return integers[:, :width] * _spread(scales, width, form)
    blocks = integers.unflatten(1, (-1, BLOCK // 2))  # [N, .../2] -> [N, blocks, 16]
    numbers = torch.cat((blocks & 15, blocks >> 4), dim=2).flatten(1)[:, :width]  # -> [N, blocks, 32] -> [N, D]
    zeros = zeros_of(rows, width, form).float() / ZERO_STEPS
    return (numbers - _spread(zeros, width, form)) * _spread(scales, width, form)


def _spread(each: Tensor, width: int, form: WeightFormat) -> Tensor:
    """One number a group, [N, groups] -> one a weight, [N, width]."""
    return each.repeat_interleave(form.group, dim=1)[:, :width]
