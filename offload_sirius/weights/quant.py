"""Quantising: rows of float weights become the bytes of quantization.py. Knows no layers and no files.

Of each row the largest weight is the outlier: it is taken out, and what is missing at its place is stored beside. Of what is
left, int8 takes the scale that the largest weight of a group needs. int4 begins with the scale and zero that cover the group,
and improves both after HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models",
mobiusml.github.io/hqq_blog, 2023), which looks at weights only and needs no data. For the integers q that a scale and zero
give, in steps of the scale,

    residual   e = w / scale - (q - zero)
    shrunk     r = sign(e) * max(0, |e| - |e|^(p - 1) / beta)       what is given up as an outlier, p = 1/2
    target     t = w / scale - r
    zero    <- mean(q - t)                                          then, and this is not in HQQ,
    scale   <- scale * sum(t (q - zero)) / sum((q - zero)^2)        with the new zero

over and over; what has the least squared error is kept. HQQ measures residuals in weights, here they are in steps, so that a
group's result does not depend on how large its weights are. On weights of SmolLM2 the error is 8 % below that of plain covering.
In torch that is 9 million weights a second and core; kernels/quantise.c does the same, to the bit, with 60 million.

Every sum goes over one group in a fixed order, and all else is elementwise: the bytes of a row do not depend on the rows beside
it or on threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.errors import CheckpointError
from offload_sirius.kernels.cpu import quantise_int4
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import BLOCK, ZERO_STEPS, WeightFormat

NUM_ITERATIONS = 10
"""Of the solver; twenty find nothing better in the third digit of the error."""

BETA = 3.0
"""How soon a residual counts as an outlier: one below beta^(-2/3), half a step, is none."""

CHUNK_WEIGHTS = 1 << 16
"""Weights that a core works on at once: some copies of them stay in its cache."""

MOST_CORES = 8
"""For which there are as many weights: the copies are some 30 MB then."""

DEVICE_CHUNK_WEIGHTS = 1 << 20
"""The same of a GPU, for which fewer would be launches and little else; the copies are some 60 MB."""

MAX_INT8, MAX_INT4 = 127, 15
SMALLEST_SCALE = 2.0**-24
"""Of float16, above zero."""


@dataclass(frozen=True, kw_only=True)
class QuantizationError:
    """How far quantised weights are from what they stand for."""

    largest: float
    """Of all weights, as they are."""
    relative_rms: float
    """Root mean square of the errors over that of the weights; 0 where all weights are 0."""


def quantise_rows(weights: Tensor, form: WeightFormat, out: Tensor | None = None) -> Tensor:
    """weights [N, D] of any float type -> uint8 [N, row_nbytes].

    out: where to write them, rows strided, on their device; None allocates. Raises CheckpointError where a weight is not finite,
    or too large for a scale in float16.
    """
    num_rows, width = weights.shape
    if out is None:
        out = torch.empty(num_rows, form.row_nbytes(width), dtype=torch.uint8, device=weights.device)
    step = _rows_at_once(weights.device, width)
    for start in range(0, num_rows, step):
        rows = QuantizedRows(out[start : start + step], width, form)
        rows.rows.zero_()  # padding has a value, too: the same weights are the same bytes
        quantise_chunk(weights[start : start + step].float(), rows)
        _check(rows)
    return out


def _rows_at_once(device: torch.device, width: int) -> int:
    cores = min(torch.get_num_threads(), MOST_CORES)
    num_weights = DEVICE_CHUNK_WEIGHTS if device.type == "cuda" else CHUNK_WEIGHTS * cores
    return max(1, num_weights // width)


def dequantise_rows(rows: Tensor, width: int, form: WeightFormat) -> Tensor:
    """rows uint8 [N, row_nbytes] -> the weights that they stand for, float32 [N, width], exactly."""
    return QuantizedRows(rows, width, form).dequantised()


def quantization_error(weights: Tensor, rows: Tensor, form: WeightFormat) -> QuantizationError:
    """Of rows uint8 [N, row_nbytes] that stand for weights [N, D]."""
    largest = squares = power = 0.0
    step = max(1, CHUNK_WEIGHTS // weights.shape[1])
    for chunk, chunk_rows in zip(weights.split(step), rows.split(step), strict=True):
        errors = dequantise_rows(chunk_rows, weights.shape[1], form) - chunk.float()
        largest = max(largest, errors.abs().max().item())
        squares += errors.square().sum(dtype=torch.float64).item()
        power += chunk.float().square().sum(dtype=torch.float64).item()
    return QuantizationError(largest=largest, relative_rms=(squares / power) ** 0.5 if power else 0.0)


def quantise_chunk(weights: Tensor, rows: QuantizedRows) -> None:
    """weights float32 [n, D] into rows that hold zeros."""
    places = weights.abs().argmax(dim=1, keepdim=True)  # [n, 1]; of a row that is not finite, a place that is not
    left = weights.scatter(1, places, 0.0)
    in_c = rows.form.kind == "int4" and left.device.type == "cpu"
    if not (in_c and quantise_int4(left, rows)):
        quantise_reference(left, rows)
    rows.outlier_places.copy_(places)
    # In 8 bits what is stored there is 0. In 4 bits no integer need stand for 0.
    rows.outlier_rests.copy_(weights.gather(1, places) - rows.without_outliers_at(places))


def quantise_reference(weights: Tensor, rows: QuantizedRows) -> None:
    """weights float32 [n, D], their outliers taken out, into rows that hold zeros, in torch."""
    integers = torch.zeros(len(rows), -(-rows.width // BLOCK) * BLOCK, device=weights.device)  # [n, blocks * 32]
    whole = rows.width // rows.form.group * rows.form.group
    first_of_last = whole // rows.form.group
    if whole:
        groups = weights[:, :whole].unflatten(1, (-1, rows.form.group))  # [n, whole] -> [n, groups, group]
        integers[:, :whole] = _quantise_groups(groups, rows, 0).flatten(1)
    if whole < rows.width:
        integers[:, whole : rows.width] = _quantise_groups(weights[:, None, whole:], rows, first_of_last).flatten(1)
    if rows.form.kind == "int8":
        rows.integers.copy_(integers)
    else:
        low, high = integers.to(torch.uint8).unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)  # [n, blocks, 16] each
        rows.integers.copy_((low | high << 4).flatten(1))


def _quantise_groups(groups: Tensor, rows: QuantizedRows, first: int) -> Tensor:
    """groups [n, g, group] -> their integers, as floats. Writes scales, and zeros, of the g groups from `first` on."""
    if rows.form.kind == "int8":
        scales = _reaching_scale(groups.abs().amax(dim=2, keepdim=True))  # [n, g, 1]
        integers = (groups * _inverse(scales)).round_().clamp_(-MAX_INT8, MAX_INT8)
    else:
        scales, zeros = _solved(groups)
        integers = _integers(groups * _inverse(scales), zeros)
        rows.zeros[:, first : first + groups.shape[1]] = (zeros * ZERO_STEPS).squeeze(2).to(torch.uint8)
    rows.scales[:, first : first + groups.shape[1]] = scales.squeeze(2).half()
    return integers


def _reaching_scale(largest: Tensor) -> Tensor:
    """The smallest in float16 that reaches the largest weight: one that does not would cut it off, by much where it is tiny."""
    scales = (largest / MAX_INT8).half()
    short = scales.float() * MAX_INT8 < largest
    return torch.where(short, (scales.view(torch.int16) + 1).view(torch.float16), scales).float()


def _check(rows: QuantizedRows) -> None:
    if not (torch.isfinite(rows.scales).all() and torch.isfinite(rows.outlier_rests).all()):
        raise CheckpointError(
            f"weights cannot be written as {rows.form.kind}: some are not finite, or too large for float16; "
            "use weights that are not quantised"
        )


def _solved(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups [n, g, group] -> the best scale and zero of each that were found, [n, g, 1] each."""
    lowest, highest = (groups.amin(dim=2, keepdim=True).clamp_(max=0), groups.amax(dim=2, keepdim=True).clamp_(min=0))
    scales = _stored_scale((highest - lowest) / MAX_INT4)
    zeros = _stored_zero(-lowest * _inverse(scales))
    best_scales, best_zeros, least = scales, zeros, torch.full_like(scales, torch.inf)
    for iteration in range(NUM_ITERATIONS + 1):
        steps = groups * _inverse(scales)
        integers = _integers(steps, zeros)
        residuals = steps - (integers - zeros)
        errors = _group_sum(residuals * residuals) * (scales * scales)
        better = errors < least
        best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
        least = torch.where(better, errors, least)
        if iteration < NUM_ITERATIONS:
            targets = steps - _shrunk(residuals)
            zeros = _stored_zero(_group_sum(integers - targets) / groups.shape[2])
            shifted = integers - zeros
            factors = _group_sum(targets * shifted) / _group_sum(shifted * shifted).clamp_(min=1e-6)
            scales = _stored_scale(scales * factors)
    # Of a group with weights that are not finite nothing is better than infinity, and its first scale is not finite.
    return best_scales, best_zeros


def _shrunk(residuals: Tensor) -> Tensor:
    """sign(e) * max(0, |e| - 1 / (beta sqrt|e|))."""
    sizes = residuals.abs()
    # At a residual of 0 the subtrahend is infinite, and what is left nothing, as it should be.
    return torch.copysign((sizes - sizes.sqrt().reciprocal() * (1 / BETA)).clamp_(min=0), residuals)


def _integers(steps: Tensor, zeros: Tensor) -> Tensor:
    return (steps + zeros).round_().clamp_(0, MAX_INT4)


def _stored_scale(scales: Tensor) -> Tensor:
    """As float16 holds them. A group of zeros has the smallest."""
    return scales.clamp(min=SMALLEST_SCALE).half().float()


def _stored_zero(zeros: Tensor) -> Tensor:
    """As a byte of sixteenths holds them."""
    return (zeros * ZERO_STEPS).round_().clamp_(0, 255) / ZERO_STEPS


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where a group has nothing but zeros."""
    return torch.where(scales == 0, 0.0, 1 / scales)


def _group_sum(groups: Tensor) -> Tensor:
    """[n, g, group] -> [n, g, 1], added in halves: the same order whatever the shape."""
    while (length := groups.shape[2]) > 1:
        half = length // 2
        folded = groups[:, :, :half] + groups[:, :, half : 2 * half]
        if length % 2:
            folded[:, :, :1] += groups[:, :, -1:]
        groups = folded
    return groups
