"""Weights of rows of blocks on a GPU: Triton kernels that write them in the type of the product, which torch then does.

The reference of both is `dequantised` in blocks.py. Importing this file imports Triton: whoever needs it does so when it is first
called. Knows no layers.
"""

# ruff: noqa: N803  # what the compiler replaces by its value is written in capitals, as everywhere in Triton

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_sirius.blocks import BlockFormat
from offload_sirius.kernels.blocks import BlockRows, NeuronRows

COLUMNS = 1024
"""Weights of a row that a program writes."""


def weights(rows: BlockRows | NeuronRows, dtype: torch.dtype) -> Tensor:
    """The weights that rows stand for, rounded to a type: [N, D]."""
    out = torch.empty(len(rows), rows.width, dtype=dtype, device=rows.device)
    if out.numel() == 0:
        return out
    grid = (len(rows), -(-rows.width // COLUMNS))
    with torch.cuda.device_of(out):  # the current device is where Triton runs it
        if isinstance(rows, BlockRows):
            _decode_rows[grid](rows.rows, rows.rows.stride(0), out, rows.width, **_constants(rows.form))
        else:
            _decode_neurons[grid](
                rows.numbers,
                rows.numbers.stride(0),
                rows.codes,
                rows.codes.stride(0),
                rows.table,
                rows.table.stride(0),
                len(rows.table) * rows.form.block,
                out,
                rows.width,
                **_constants(rows.form),
            )
    return out


def _constants(form: BlockFormat) -> dict[str, Any]:
    return {
        "BLOCK": form.block,
        "BLOCK_NBYTES": form.block_nbytes,
        "BITS": form.bits,
        "GROUP": form.group,
        "CENTRE": form.centre,
        "HAS_MINIMUM": form.has_minimum,
        "COLUMNS": COLUMNS,
    }


# No annotations but constexpr: the compiler evaluates them, and knows no names but its own.
@triton.jit
def _half_at(place, inside):  # type: ignore[no-untyped-def]
    # Of two bytes anywhere: blocks begin at any even one.
    low, high = tl.load(place, mask=inside, other=0).to(tl.uint16), tl.load(place + 1, mask=inside, other=0).to(tl.uint16)
    return (low | high << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale_and_minimum(scales, step, group, inside):  # type: ignore[no-untyped-def]
    # Of eight groups four have six bits in bytes of their own, the others four in bytes 8 to 11 and two on top of those.
    first = tl.load(scales + group % 4 * step, mask=inside, other=0)
    second = tl.load(scales + (group % 4 + 4) * step, mask=inside, other=0)
    mixed = tl.load(scales + (group % 4 + 8) * step, mask=inside, other=0)
    scale = tl.where(group < 4, first & 63, (mixed & 15) | (first >> 2 & 48))
    minimum = tl.where(group < 4, second & 63, (mixed >> 4) | (second >> 2 & 48))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_rows(  # type: ignore[no-untyped-def]
    rows,
    stride,
    out,
    width,
    BLOCK: tl.constexpr,
    BLOCK_NBYTES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    block = rows + row * stride + column // BLOCK * BLOCK_NBYTES
    i = column % BLOCK
    group = i // GROUP
    if BITS == 6:
        half, quarter = i // 128, i % 128 // 32
        low = tl.load(block + half * 64 + quarter % 2 * 32 + i % 32, mask=inside, other=0) >> (quarter // 2 * 4).to(tl.uint8)
        high = tl.load(block + 128 + half * 32 + i % 32, mask=inside, other=0) >> (quarter * 2).to(tl.uint8)
        number = ((low & 15) | (high & 3) << 4).to(tl.float32)
        scale = tl.load(block + 192 + group, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        factor = _half_at(block + 208, inside) * scale
    elif BLOCK == 256:
        codes = block + BLOCK_NBYTES - 128
        number = tl.load(codes + i // 64 * 32 + i % 32, mask=inside, other=0) >> (group % 2 * 4).to(tl.uint8) & 15
        if BITS == 5:
            number = number | (tl.load(block + 16 + i % 32, mask=inside, other=0) >> group.to(tl.uint8) & 1) << 4
        number = number.to(tl.float32)
        scale, minimum = _scale_and_minimum(block + 4, 1, group, inside)
        factor, summand = _half_at(block, inside) * scale, -(_half_at(block + 2, inside) * minimum)
    else:
        factor = _half_at(block, inside)
        if HAS_MINIMUM:
            summand = _half_at(block + 2, inside)
        if BITS == 8:
            number = tl.load(block + 2 + i, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        else:
            number = tl.load(block + BLOCK_NBYTES - 16 + i % 16, mask=inside, other=0) >> (i // 16 * 4).to(tl.uint8) & 15
            if BITS == 5:
                high = tl.load(block + BLOCK_NBYTES - 20 + i // 8, mask=inside, other=0) >> (i % 8).to(tl.uint8) & 1
                number = number | high << 4
            number = number.to(tl.float32)
    weight = (number - CENTRE) * factor
    if HAS_MINIMUM:
        weight += summand
    tl.store(out + row * width + column, weight, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _decode_neurons(  # type: ignore[no-untyped-def]
    numbers,
    numbers_stride,
    codes,
    codes_stride,
    table,
    table_stride,
    num_neurons,
    out,
    width,
    BLOCK: tl.constexpr,
    BLOCK_NBYTES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CENTRE: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    neuron = tl.load(numbers + row * numbers_stride)
    neuron = tl.where((neuron >= 0) & (neuron < num_neurons), neuron, 0)
    group = neuron % BLOCK // GROUP
    factors = table + (neuron // BLOCK).to(tl.int64) * table_stride
    factor = _half_at(factors + 2 * column, inside)
    if HAS_MINIMUM:
        summand = _half_at(factors + 2 * (width + column), inside)
    if BITS == 6:
        scales = factors + 2 * width + group * width + column
        factor *= tl.load(scales, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    elif BLOCK == 256:
        scale, minimum = _scale_and_minimum(factors + 4 * width + column, width, group, inside)
        factor, summand = factor * scale, -(summand * minimum)
    unit = codes + row * codes_stride + column // 32 * (4 * BITS)
    i = column % 32
    if BITS == 8:
        number = tl.load(unit + i, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        number = tl.load(unit + i % 16, mask=inside, other=0) >> (i // 16 * 4).to(tl.uint8) & 15
        if BITS == 5:
            number = number | (tl.load(unit + 16 + i // 8, mask=inside, other=0) >> (i % 8).to(tl.uint8) & 1) << 4
        elif BITS == 6:
            number = number | (tl.load(unit + 16 + i % 8, mask=inside, other=0) >> (i // 8 * 2).to(tl.uint8) & 3) << 4
        number = number.to(tl.float32)
    weight = (number - CENTRE) * factor
    if HAS_MINIMUM:
        weight += summand
    tl.store(out + row * width + column, weight, mask=inside)
