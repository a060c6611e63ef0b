"""Products of a few tokens with quantised rows on a GPU: Triton kernels; the plain torch reference of each is in quantized.py.

Importing this file imports Triton: whoever needs it does so when it is first called. Knows no layers.

A product goes group by group. For one token, which is bound by memory, everything is float32. For more of them integers meet the
tokens in the tokens' type, which holds them exactly, on tensor cores, and scales come in where sums are float32 already:

    y += scale * (x . q - zero * sum(x))

A down projection sums over rows, each with its own scale. For one token a program takes some of the rows of one group of columns;
how many rows depends on their number alone, so that the sums of all programs are the same every time. For more tokens `weights`
writes the rows, and torch multiplies: a kernel that did both took more than twice as long on an H200.

How many rows there are is not compiled in: a draft keeps other neurons for each token.

Sizes of programs are fixed. They are what was fastest on an H200; to try several on every new shape would take seconds before the
first token, and memory of the device that no plan knows of.
"""

# ruff: noqa: N803, N806  # what the compiler replaces by its value is written in capitals, as everywhere in Triton

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_sirius.kernels.cpu import Activation
from offload_sirius.kernels.packed import QuantizedRows

MAX_TOKENS_OF_PROGRAM = 64


@dataclass(frozen=True)
class Size:
    """Of a program for one token."""

    rows: int
    """Of a step."""
    unroll: int
    """Steps whose loads are under way together."""
    warps: int


LINEAR_SIZE, DOWN_SIZE = Size(rows=16, unroll=8, warps=4), Size(rows=16, unroll=2, warps=2)

MAX_DOWN_PARTS = 64
"""Groups of columns alone are too few programs for a large GPU."""

FEW_ROWS = 8192
"""Of a matrix with fewer, programs of many rows would be too few for a GPU."""

WEIGHTS_ROWS = 32
"""Whose weights a program writes, of one group."""


def linear(x: Tensor, rows: QuantizedRows) -> Tensor:
    """x [S, D] -> float32 [S, N]; see quantized.py."""
    return _linear(x, rows, rows, "none")


def gate_up(x: Tensor, gate: QuantizedRows, up: QuantizedRows, activation: Activation) -> Tensor:
    """x [S, D] -> float32 [S, N]; see quantized.py."""
    return _linear(x, gate, up, activation)


def down_of_one(z: Tensor, rows: QuantizedRows) -> Tensor:
    """z [1, N] -> float32 [1, D]; see quantized.py."""
    num_rows, step = len(rows), DOWN_SIZE.rows * DOWN_SIZE.unroll
    num_parts = max(1, min(MAX_DOWN_PARTS, num_rows // (4 * step)))
    parts = torch.empty(num_parts, rows.width, device=z.device)
    if parts.numel() == 0 or num_rows == 0:
        return parts.zero_().sum(0, keepdim=True)
    with torch.cuda.device_of(z):  # the current device is where Triton runs it
        _down_of_one[rows.form.num_groups(rows.width), num_parts](
            z,
            *_views(rows),
            parts,
            num_rows,
            rows.width,
            -(-num_rows // (num_parts * step)) * step,
            **_form(rows),
            BLOCK_ROWS=DOWN_SIZE.rows,
            UNROLL=DOWN_SIZE.unroll,
            num_warps=DOWN_SIZE.warps,
        )
    return parts.sum(0, keepdim=True)


def weights(rows: QuantizedRows, dtype: torch.dtype) -> Tensor:
    """The weights that rows stand for, rounded to a type: [N, D]."""
    out = torch.empty(len(rows), rows.width, dtype=dtype, device=rows.rows.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(out):  # the current device is where Triton runs it
        _weights[-(-len(rows) // WEIGHTS_ROWS), rows.form.num_groups(rows.width)](
            *_views(rows), out, len(rows), rows.width, **_form(rows), BLOCK_ROWS=WEIGHTS_ROWS
        )
    return out


def _linear(x: Tensor, gate: QuantizedRows, up: QuantizedRows, activation: str) -> Tensor:
    """activation: none where gate's product is all."""
    num_tokens, num_rows = x.shape[0], len(gate)
    out = torch.empty(num_tokens, num_rows, device=x.device)
    if out.numel() == 0:
        return out
    matrices = (*_views(gate), *_views(up), out)
    with torch.cuda.device_of(x):  # the current device is where Triton runs it
        if num_tokens == 1:
            _linear_of_one[(-(-num_rows // LINEAR_SIZE.rows),)](
                x,
                *matrices,
                num_rows,
                gate.width,
                ACTIVATION=activation,
                **_form(gate),
                BLOCK_ROWS=LINEAR_SIZE.rows,
                UNROLL=LINEAR_SIZE.unroll,
                num_warps=LINEAR_SIZE.warps,
            )
        else:
            # A product on tensor cores has 16 tokens at least.
            block_tokens = max(16, min(MAX_TOKENS_OF_PROGRAM, 1 << (num_tokens - 1).bit_length()))
            block_rows, stages = (128, 3) if num_rows >= FEW_ROWS else (32, 4)
            _linear_rows[-(-num_rows // block_rows), -(-num_tokens // block_tokens)](
                x,
                x.stride(0),
                *matrices,
                num_tokens,
                num_rows,
                gate.width,
                ACTIVATION=activation,
                **_form(gate),
                BLOCK_TOKENS=block_tokens,
                BLOCK_ROWS=block_rows,
                num_warps=4,
                num_stages=stages,
            )
    return out


def _form(rows: QuantizedRows) -> dict[str, Any]:
    return {"INT4": rows.form.kind == "int4", "GROUP": rows.form.group}


def _views(rows: QuantizedRows) -> tuple[Tensor, int, Tensor, int, Tensor, Tensor, Tensor]:
    """Integers, scales, zeros, with strides, then places and rests of outliers, as far apart as scales.

    int8 has no zeros, and its kernels do not look at them.
    """
    integers, scales = rows.integers, rows.scales
    zeros = rows.zeros if rows.form.kind == "int4" else integers
    return integers, integers.stride(0), scales, scales.stride(0), zeros, rows.outlier_places, rows.outlier_rests


# No annotations but constexpr: the compiler evaluates them, and knows no names but its own.
@triton.jit  # type: ignore[untyped-decorator]
def _group_products(  # type: ignore[no-untyped-def]
    x,
    x_inside,
    columns,
    width,
    integers,
    scales,
    zeros,
    rows_inside,
    group,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
):
    # x, integers, ...: pointers to rows, [S, 1] and [1, N]. -> float32 [S, N], this group's share.
    scale = tl.load(scales + group, mask=rows_inside, other=0).to(tl.float32)
    if INT4:
        # Byte i of a block of 16 holds the block's integers i and 16 + i.
        index = tl.arange(0, GROUP // 2)
        first = group * GROUP + index // 16 * 32 + index % 16
        x_low = tl.load(x + first[None, :], mask=x_inside & (first < width)[None, :], other=0)
        x_high = tl.load(x + first[None, :] + 16, mask=x_inside & (first + 16 < width)[None, :], other=0)
        # The last block is there as a whole, those behind it are not.
        there = group * GROUP + index // 16 * 32 < width
        both = tl.load(integers + (group * (GROUP // 2) + index)[:, None], mask=rows_inside & there[:, None], other=0)
        product = tl.dot(x_low, (both & 15).to(x_low.dtype), input_precision="ieee")
        product = tl.dot(x_high, (both >> 4).to(x_low.dtype), product, input_precision="ieee")
        x_sum = tl.sum(x_low.to(tl.float32), 1) + tl.sum(x_high.to(tl.float32), 1)
        zero = tl.load(zeros + group, mask=rows_inside, other=0).to(tl.float32) * 0.0625
        return (product - x_sum[:, None] * zero) * scale
    else:
        column = group * GROUP + columns
        values = tl.load(x + column[None, :], mask=x_inside & (column < width)[None, :], other=0)
        numbers = tl.load(integers + column[:, None], mask=rows_inside & (column < width)[:, None], other=0)
        return tl.dot(values, numbers.to(values.dtype), input_precision="ieee") * scale


@triton.jit
def _outlier_products(x, x_inside, width, places, rests, at, inside):  # type: ignore[no-untyped-def]
    # x: pointers to rows, [S, 1]; at: of each row [N]. -> float32 [S, N]
    column = tl.load(places + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    rest = tl.load(rests + at, mask=inside, other=0).to(tl.float32)
    # Bytes from a file may say anything: a place behind the end is nowhere.
    values = tl.load(x + column[None, :], mask=x_inside & (inside & (column < width))[None, :], other=0).to(tl.float32)
    return values * rest[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _activated(g, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == "silu":
        return g / (1 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1 + tl.erf(g * 0.70710678118654752))
    else:
        # tanh(u) = 1 - 2 / (exp(2 u) + 1)
        u = 0.79788456080286536 * (g + 0.044715 * g * g * g)
        return g * (1 - 1 / (tl.exp(2 * u) + 1))


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])  # type: ignore[untyped-decorator]
def _linear_rows(  # type: ignore[no-untyped-def]
    x,
    x_stride,
    gate_integers,
    gate_stride,
    gate_scales,
    gate_scales_stride,
    gate_zeros,
    gate_places,
    gate_rests,
    up_integers,
    up_stride,
    up_scales,
    up_scales_stride,
    up_zeros,
    up_places,
    up_rests,
    out,
    num_tokens,
    num_rows,
    width,
    ACTIVATION: tl.constexpr,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows_inside, x_inside = (place < num_rows)[None, :], (token < num_tokens)[:, None]
    row = place.to(tl.int64)
    x_rows = x + token.to(tl.int64)[:, None] * x_stride
    columns = tl.arange(0, GROUP)
    gates = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), dtype=tl.float32)
    for group in range(tl.cdiv(width, GROUP)):
        gates += _group_products(
            x_rows,
            x_inside,
            columns,
            width,
            gate_integers + row[None, :] * gate_stride,
            gate_scales + row[None, :] * gate_scales_stride,
            gate_zeros + row[None, :] * gate_stride,
            rows_inside,
            group,
            INT4,
            GROUP,
        )
    gates += _outlier_products(x_rows, x_inside, width, gate_places, gate_rests, row * gate_scales_stride, place < num_rows)
    if ACTIVATION != "none":
        ups = tl.zeros((BLOCK_TOKENS, BLOCK_ROWS), dtype=tl.float32)
        for group in range(tl.cdiv(width, GROUP)):
            ups += _group_products(
                x_rows,
                x_inside,
                columns,
                width,
                up_integers + row[None, :] * up_stride,
                up_scales + row[None, :] * up_scales_stride,
                up_zeros + row[None, :] * up_stride,
                rows_inside,
                group,
                INT4,
                GROUP,
            )
        ups += _outlier_products(x_rows, x_inside, width, up_places, up_rests, row * up_scales_stride, place < num_rows)
        gates = _activated(gates, ACTIVATION) * ups
    tl.store(out + token.to(tl.int64)[:, None] * num_rows + place[None, :], gates, mask=x_inside & rows_inside)


@triton.jit  # type: ignore[untyped-decorator]
def _one_token_group(  # type: ignore[no-untyped-def]
    x,
    integers,
    scales,
    zeros,
    inside,
    group,
    width,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
):
    # integers, ...: pointers to rows, [N, 1]. -> float32 [N, GROUP] or, two weights in one, [N, GROUP / 2]: this group's products
    if INT4:
        # Byte i of a block of 16 holds the block's integers i and 16 + i.
        index = tl.arange(0, GROUP // 2)
        column = group * GROUP + index // 16 * 32 + index % 16
        low = tl.load(x + column, mask=column < width, other=0).to(tl.float32)[None, :]
        high = tl.load(x + column + 16, mask=column + 16 < width, other=0).to(tl.float32)[None, :]
        # The last block is there as a whole, those behind it are not.
        there = group * GROUP + index // 16 * 32 < width
        both = tl.load(integers + (group * (GROUP // 2) + index)[None, :], mask=inside & there[None, :], other=0)
        scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)
        zero = tl.load(zeros + group, mask=inside, other=0).to(tl.float32) * 0.0625
        return (((both & 15).to(tl.float32) - zero) * low + ((both >> 4).to(tl.float32) - zero) * high) * scale
    else:
        column = group * GROUP + tl.arange(0, GROUP)
        values = tl.load(x + column, mask=column < width, other=0).to(tl.float32)[None, :]
        numbers = tl.load(integers + column[None, :], mask=inside & (column < width)[None, :], other=0)
        scale = tl.load(scales + group, mask=inside, other=0).to(tl.float32)
        return numbers.to(tl.float32) * values * scale


@triton.jit  # type: ignore[untyped-decorator]
def _one_token_rows(  # type: ignore[no-untyped-def]
    x,
    integers,
    stride,
    scales,
    scales_stride,
    zeros,
    places,
    rests,
    row,
    inside,
    width,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # row, inside: [N]. -> float32 [N]
    COLUMNS: tl.constexpr = GROUP // 2 if INT4 else GROUP
    sums = tl.zeros((BLOCK_ROWS, COLUMNS), dtype=tl.float32)
    num_groups = tl.cdiv(width, GROUP)
    rows_inside = inside[:, None]
    for first in range(0, num_groups, UNROLL):
        for offset in tl.static_range(UNROLL):
            group = first + offset
            sums += _one_token_group(
                x,
                integers + row[:, None] * stride,
                scales + row[:, None] * scales_stride,
                zeros + row[:, None] * stride,
                rows_inside & (group < num_groups),
                group,
                width,
                INT4,
                GROUP,
            )
    at = row * scales_stride
    column = tl.load(places + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    rest = tl.load(rests + at, mask=inside, other=0).to(tl.float32)
    # Bytes from a file may say anything: a place behind the end is nowhere.
    value = tl.load(x + column, mask=inside & (column < width), other=0).to(tl.float32)
    return tl.sum(sums, 1) + value * rest


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _linear_of_one(  # type: ignore[no-untyped-def]
    x,
    gate_integers,
    gate_stride,
    gate_scales,
    gate_scales_stride,
    gate_zeros,
    gate_places,
    gate_rests,
    up_integers,
    up_stride,
    up_scales,
    up_scales_stride,
    up_zeros,
    up_places,
    up_rests,
    out,
    num_rows,
    width,
    ACTIVATION: tl.constexpr,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    place = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside, row = place < num_rows, place.to(tl.int64)
    y = _one_token_rows(
        x,
        gate_integers,
        gate_stride,
        gate_scales,
        gate_scales_stride,
        gate_zeros,
        gate_places,
        gate_rests,
        row,
        inside,
        width,
        INT4,
        GROUP,
        BLOCK_ROWS,
        UNROLL,
    )
    if ACTIVATION != "none":
        y = _activated(y, ACTIVATION) * _one_token_rows(
            x,
            up_integers,
            up_stride,
            up_scales,
            up_scales_stride,
            up_zeros,
            up_places,
            up_rests,
            row,
            inside,
            width,
            INT4,
            GROUP,
            BLOCK_ROWS,
            UNROLL,
        )
    tl.store(out + place, y, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "rows_of_part"])  # type: ignore[untyped-decorator]
def _down_of_one(  # type: ignore[no-untyped-def]
    z,
    integers,
    stride,
    scales,
    scales_stride,
    zeros,
    places,
    rests,
    parts,
    num_rows,
    width,
    rows_of_part,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    # A program has the columns of one group, so that a row's scale meets the token's number.
    group, part = tl.program_id(0), tl.program_id(1)
    if INT4:
        index = tl.arange(0, GROUP // 2)
        column = group * GROUP + index // 16 * 32 + index % 16
        there = (group * GROUP + index // 16 * 32 < width)[None, :]
        byte = group * (GROUP // 2) + index
        low = tl.zeros((BLOCK_ROWS, GROUP // 2), dtype=tl.float32)
        high = tl.zeros((BLOCK_ROWS, GROUP // 2), dtype=tl.float32)
    else:
        column = group * GROUP + tl.arange(0, GROUP)
        there = (column < width)[None, :]
        byte = column
        low = tl.zeros((BLOCK_ROWS, GROUP), dtype=tl.float32)
    shift = tl.zeros((BLOCK_ROWS, 1), dtype=tl.float32)
    end = tl.minimum(num_rows, (part + 1) * rows_of_part)
    for first in range(part * rows_of_part, end, BLOCK_ROWS * UNROLL):
        for offset in tl.static_range(UNROLL):
            place = (first + offset * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
            inside = place < end
            row = place.to(tl.int64)
            value = tl.load(z + place, mask=inside, other=0).to(tl.float32)
            scale = tl.load(scales + row * scales_stride + group, mask=inside, other=0).to(tl.float32) * value
            outlier = tl.load(places + row * scales_stride, mask=inside, other=0).to(tl.int32) & 0xFFFF
            rest = tl.load(rests + row * scales_stride, mask=inside, other=0).to(tl.float32) * value
            numbers = tl.load(integers + row * stride + byte[None, :], mask=inside & there, other=0)
            if INT4:
                zero = tl.load(zeros + row * stride + group, mask=inside, other=0).to(tl.float32) * 0.0625
                shift += zero * scale
                low += (numbers & 15).to(tl.float32) * scale + tl.where(column[None, :] == outlier, rest, 0)
                high += (numbers >> 4).to(tl.float32) * scale + tl.where(column[None, :] + 16 == outlier, rest, 0)
            else:
                low += numbers.to(tl.float32) * scale + tl.where(column[None, :] == outlier, rest, 0)
    out = parts + part.to(tl.int64) * width + column
    tl.store(out, tl.sum(low - shift, 0), mask=column < width)
    if INT4:
        tl.store(out + 16, tl.sum(high - shift, 0), mask=column + 16 < width)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    integers,
    stride,
    scales,
    scales_stride,
    zeros,
    places,
    rests,
    out,
    num_rows,
    width,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    # int4: byte i of a block of 16 holds the block's integers i and 16 + i.
    place, group = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None], tl.program_id(1)
    inside, row = place < num_rows, place.to(tl.int64)
    scale = tl.load(scales + row * scales_stride + group, mask=inside, other=0).to(tl.float32)
    outlier = tl.load(places + row * scales_stride, mask=inside, other=0).to(tl.int32) & 0xFFFF
    rest = tl.load(rests + row * scales_stride, mask=inside, other=0).to(tl.float32)
    if INT4:
        index = tl.arange(0, GROUP // 2)[None, :]
        column = group * GROUP + index // 16 * 32 + index % 16
        there = inside & (group * GROUP + index // 16 * 32 < width)
        both = tl.load(integers + row * stride + group * (GROUP // 2) + index, mask=there, other=0)
        zero = tl.load(zeros + row * stride + group, mask=inside, other=0).to(tl.float32) * 0.0625
        low = ((both & 15).to(tl.float32) - zero) * scale + tl.where(column == outlier, rest, 0)
        high = ((both >> 4).to(tl.float32) - zero) * scale + tl.where(column + 16 == outlier, rest, 0)
        tl.store(out + row * width + column, low, mask=inside & (column < width))
        tl.store(out + row * width + column + 16, high, mask=inside & (column + 16 < width))
    else:
        column = group * GROUP + tl.arange(0, GROUP)[None, :]
        numbers = tl.load(integers + row * stride + column, mask=inside & (column < width), other=0)
        value = numbers.to(tl.float32) * scale + tl.where(column == outlier, rest, 0)
        tl.store(out + row * width + column, value, mask=inside & (column < width))
