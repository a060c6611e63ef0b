"""Products of a few tokens with quantised rows on a GPU: Triton kernels; the plain torch reference of each is in quantized.py.

Importing this file imports Triton: whoever needs it does so when it is first called. Knows no layers.

A product goes group by group. Integers meet the tokens in the tokens' type, which holds them exactly, and scales come in where
sums are float32 already:

    y += scale * (x . q - zero * sum(x))

`down` sums over rows, each with its own scale, so there weights are rounded to the type of z. A program of it takes some of the
rows; how many there are depends on the number of rows alone, and their sums are added in order.
"""

# ruff: noqa: N803  # what the compiler replaces by its value is written in capitals, as everywhere in Triton

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload_sirius.kernels.cpu import Activation
from offload_sirius.kernels.packed import QuantizedRows

MAX_TOKENS_OF_PROGRAM = 64

DOWN_COLUMNS, DOWN_ROWS = 128, 32
"""Of a program's step: 64 bytes of an int4 row, and as many rows as a tensor core's product wants at least twice."""

MAX_DOWN_PARTS = 8
"""Columns alone are too few programs for a large GPU."""


def linear(x: Tensor, rows: QuantizedRows) -> Tensor:
    """x [S, D] -> float32 [S, N]; see quantized.py."""
    out = torch.empty(x.shape[0], len(rows), device=x.device)
    _launch(x, rows, rows, out, "none")
    return out


def gate_up(x: Tensor, gate: QuantizedRows, up: QuantizedRows, activation: Activation) -> Tensor:
    """x [S, D] -> float32 [S, N]; see quantized.py."""
    out = torch.empty(x.shape[0], len(gate), device=x.device)
    _launch(x, gate, up, out, activation)
    return out


def down(z: Tensor, rows: QuantizedRows) -> Tensor:
    """z [S, N] -> float32 [S, D]; see quantized.py."""
    num_tokens, num_rows = z.shape
    num_parts = max(1, min(MAX_DOWN_PARTS, num_rows // (4 * DOWN_ROWS)))
    parts = torch.empty(num_parts, num_tokens, rows.width, device=z.device)
    if parts.numel() == 0 or num_rows == 0:
        return parts.zero_().sum(0)
    block_tokens = _block_tokens(num_tokens)
    rows_of_part = -(-num_rows // (num_parts * DOWN_ROWS)) * DOWN_ROWS
    grid = (-(-rows.width // DOWN_COLUMNS), num_parts, -(-num_tokens // block_tokens))
    with torch.cuda.device_of(z):  # the current device is where Triton runs it
        _down_rows[grid](
            z,
            z.stride(0),
            *_views(rows),
            parts,
            num_tokens,
            num_rows,
            rows.width,
            rows_of_part,
            INT4=rows.form.kind == "int4",
            GROUP=rows.form.group,
            BLOCK_TOKENS=block_tokens,
            BLOCK_COLUMNS=DOWN_COLUMNS,
            BLOCK_ROWS=DOWN_ROWS,
        )
    return parts.sum(0)


def _launch(x: Tensor, gate: QuantizedRows, up: QuantizedRows, out: Tensor, activation: str) -> None:
    if out.numel() == 0:
        return
    num_tokens, num_rows = out.shape
    block_tokens = _block_tokens(num_tokens)
    with torch.cuda.device_of(x):  # the current device is where Triton runs it
        _linear_rows[lambda tuned: (-(-num_rows // tuned["BLOCK_ROWS"]), -(-num_tokens // block_tokens))](
            x,
            x.stride(0),
            *_views(gate),
            *_views(up),
            out,
            num_tokens,
            num_rows,
            gate.width,
            ACTIVATION=activation,
            INT4=gate.form.kind == "int4",
            GROUP=gate.form.group,
            BLOCK_TOKENS=block_tokens,
        )


def _block_tokens(num_tokens: int) -> int:
    """Tokens of a program: a product on tensor cores has 16 at least."""
    return max(16, min(MAX_TOKENS_OF_PROGRAM, 1 << (num_tokens - 1).bit_length()))


def _views(rows: QuantizedRows) -> tuple[Tensor, int, Tensor, int, Tensor, Tensor, Tensor]:
    """Integers, scales, zeros, with strides, then places and rests of outliers, as far apart as scales.

    int8 has no zeros, and its kernels do not look at them.
    """
    integers, scales = rows.integers, rows.scales
    zeros = rows.zeros if rows.form.kind == "int4" else integers
    return integers, integers.stride(0), scales, scales.stride(0), zeros, rows.outlier_places, rows.outlier_rests


def _configs() -> list[Any]:
    """Which sizes are tried on a new shape; the interpreter can measure nothing."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [triton.Config({"BLOCK_ROWS": 16})]
    return [
        triton.Config({"BLOCK_ROWS": rows}, num_warps=warps, num_stages=stages)
        for rows, warps in ((16, 2), (32, 4), (64, 4), (128, 8))
        for stages in (2, 4)
    ]


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


# Not tuned anew for each number of rows: a draft keeps other neurons for each token.
@triton.autotune(  # type: ignore[untyped-decorator]
    configs=_configs(), key=["width", "ACTIVATION", "INT4", "GROUP", "BLOCK_TOKENS"]
)
@triton.jit  # type: ignore[untyped-decorator]
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
def _down_rows(  # type: ignore[no-untyped-def]
    z,
    z_stride,
    integers,
    stride,
    scales,
    scales_stride,
    zeros,
    places,
    rests,
    parts,
    num_tokens,
    num_rows,
    width,
    rows_of_part,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    first_column, part = tl.program_id(0) * BLOCK_COLUMNS, tl.program_id(1)
    token = tl.program_id(2) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    z_inside = (token < num_tokens)[:, None]
    z_rows = z + token.to(tl.int64)[:, None] * z_stride
    if INT4:
        # Byte i of a block of 16 holds the block's integers i and 16 + i; both are of one group.
        index = tl.arange(0, BLOCK_COLUMNS // 2)
        column = first_column + index // 16 * 32 + index % 16
        there = first_column + index // 16 * 32 < width
        byte = first_column // 2 + index
        high = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS // 2), dtype=tl.float32)
        low = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS // 2), dtype=tl.float32)
    else:
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        there = column < width
        byte = column
        low = tl.zeros((BLOCK_TOKENS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(part * rows_of_part, tl.minimum(num_rows, (part + 1) * rows_of_part), BLOCK_ROWS):
        place = first + tl.arange(0, BLOCK_ROWS)
        inside = place < num_rows
        row = place.to(tl.int64)
        values = tl.load(z_rows + place[None, :], mask=z_inside & inside[None, :], other=0)
        mask = inside[:, None] & there[None, :]
        numbers = tl.load(integers + row[:, None] * stride + byte[None, :], mask=mask, other=0)
        group = (column // GROUP)[None, :]
        scale = tl.load(scales + row[:, None] * scales_stride + group, mask=mask, other=0).to(tl.float32)
        outlier = tl.load(places + row * scales_stride, mask=inside, other=0).to(tl.int32)[:, None] & 0xFFFF
        rest = tl.load(rests + row * scales_stride, mask=inside, other=0).to(tl.float32)[:, None]
        if INT4:
            zero = tl.load(zeros + row[:, None] * stride + group, mask=mask, other=0).to(tl.float32) * 0.0625
            lows = ((numbers & 15).to(tl.float32) - zero) * scale + tl.where(column[None, :] == outlier, rest, 0)
            highs = ((numbers >> 4).to(tl.float32) - zero) * scale + tl.where(column[None, :] + 16 == outlier, rest, 0)
            low = tl.dot(values, lows.to(values.dtype), low, input_precision="ieee")
            high = tl.dot(values, highs.to(values.dtype), high, input_precision="ieee")
        else:
            weights = numbers.to(tl.float32) * scale + tl.where(column[None, :] == outlier, rest, 0)
            low = tl.dot(values, weights.to(values.dtype), low, input_precision="ieee")
    out = parts + (part * num_tokens + token).to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out, low, mask=z_inside & (column < width)[None, :])
    if INT4:
        tl.store(out + 16, high, mask=z_inside & (column + 16 < width)[None, :])
