"""Rows of blocks as tensors, and the weights that they stand for in plain torch. Knows no layers and no files.

Dequantising does the operations of llama.cpp in its order, so that it gives the same float32 numbers. The bytes are those of
`offload_sirius.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_sirius.blocks import HALF_NBYTES, UNIT, BlockFormat

REGROUPED_CODES = 1 << 19
"""Codes of a down projection that are regrouped at once: a few copies of them, a byte each, stay in a core's cache."""

Take = Callable[[Tensor], Tensor]
"""Numbers of scale bytes -> those bytes, of every block that is looked at."""


@dataclass(frozen=True)
class BlockRows:
    """N rows of D weights in whole blocks, anywhere: a matrix, or one of the rows of every neuron record."""

    rows: Tensor
    """uint8 [N, row_nbytes]; the bytes of a row are contiguous, rows begin at even bytes."""
    width: int
    """D"""
    form: BlockFormat

    def __post_init__(self) -> None:
        assert self.rows.dtype == torch.uint8, self.rows.dtype
        assert self.rows.shape[1] == self.form.row_nbytes(self.width), (self.rows.shape, self.width, self.form)
        assert self.rows.stride(1) == 1, self.rows.stride()

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, part: slice) -> BlockRows:
        """Neighbouring rows, as a view."""
        return BlockRows(self.rows[part], self.width, self.form)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.rows.nbytes

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.rows.device

    def take(self, ids: Tensor) -> BlockRows:
        """Those rows, int64 [n], copied."""
        return BlockRows(self.rows[ids], self.width, self.form)

    def dequantised(self) -> Tensor:
        """The weights that they stand for, float32 [N, D]."""
        form = self.form
        blocks = self.rows.unflatten(1, (-1, form.block_nbytes))  # [N, blocks, block_nbytes]
        header, codes = split_blocks(blocks, form)
        d, minimum, scales = split_header(header, form)
        sub = torch.arange(form.block // form.group, device=header.device)
        factors, summands = _factors(form, d, minimum, lambda index: scales[..., index], sub, sub < 4)
        numbers: Tensor = _numbers(codes_of(codes, form), form).unflatten(2, (-1, form.group))  # [N, blocks, groups, group]
        numbers.mul_(factors.expand(*numbers.shape[:3])[..., None])
        if summands is not None:
            numbers.add_(summands.expand(*numbers.shape[:3])[..., None])
        return numbers.flatten(1)


@dataclass(frozen=True)
class NeuronRows:
    """N neurons' rows of a down projection: codes of D outputs each, and the table in which each finds its factors."""

    numbers: Tensor
    """int32 [N]: which neuron of the layer each is. Bytes from a file may say anything: one behind the table is the first."""
    codes: Tensor
    """uint8 [N, column_nbytes]; the bytes of a row are contiguous."""
    table: Tensor
    """uint8 [blocks of neurons, header_nbytes * D], of all neurons of the layer; contiguous."""
    width: int
    """D"""
    form: BlockFormat

    def __post_init__(self) -> None:
        assert self.numbers.dtype == torch.int32, self.numbers.dtype
        assert self.codes.shape == (len(self.numbers), self.form.column_nbytes(self.width)), (self.codes.shape, self.form)
        assert self.table.shape[1] == self.form.header_nbytes * self.width, (self.table.shape, self.width, self.form)

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.codes.device

    def __getitem__(self, part: slice) -> NeuronRows:
        """Neighbouring ones, as a view."""
        return NeuronRows(self.numbers[part], self.codes[part], self.table, self.width, self.form)

    def dequantised(self) -> Tensor:
        """The weights that they stand for, float32 [N, D]."""
        form, width = self.form, self.width
        d, minimum, planes = self._planes()
        numbers = torch.where((self.numbers >= 0) & (self.numbers < len(self.table) * form.block), self.numbers, 0).long()
        block, sub = numbers // form.block, numbers % form.block // form.group
        of_block = None if minimum is None else minimum[block]
        factors, summands = _factors(form, d[block], of_block, lambda index: planes[block, index], sub, (sub < 4)[:, None])
        weights = _numbers(regrouped_codes(self.codes, form), form).mul_(factors)
        assert weights.shape == (len(self), width)
        return weights if summands is None else weights.add_(summands)

    def _planes(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Views of the table: d and minimum float16 [blocks, D], scale bytes [blocks, n, D]."""
        form, width = self.form, self.width
        end = HALF_NBYTES * width
        d, minimum = self.table[:, :end].view(torch.float16), None
        if form.has_minimum:
            minimum = self.table[:, end : 2 * end].view(torch.float16)
            end *= 2
        return d, minimum, self.table[:, end:].unflatten(1, (form.scales_nbytes, width))


def split_blocks(blocks: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Blocks [..., block_nbytes] -> what they have beside codes, d first [..., header_nbytes], and codes [..., codes_nbytes]."""
    if form.name != "Q6_K":
        return blocks[..., : form.header_nbytes], blocks[..., form.header_nbytes :]
    codes, scales, d = blocks.split((form.codes_nbytes, form.scales_nbytes, HALF_NBYTES), dim=-1)
    return torch.cat((d, scales), dim=-1), codes


def split_header(header: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor | None, Tensor]:
    """Headers [..., header_nbytes] -> d [..., 1], m or dmin [..., 1], scale bytes [..., n]."""
    halves = header[..., : form.header_nbytes - form.scales_nbytes].contiguous().view(torch.float16)
    return halves[..., :1], halves[..., 1:] if form.has_minimum else None, header[..., form.header_nbytes - form.scales_nbytes :]


def _factors(
    form: BlockFormat, d: Tensor, minimum: Tensor | None, take: Take, sub: Tensor, is_early: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Factor and summand of groups, float32. sub: which group of its block each is; is_early: it is one of the first four."""
    d, minimum = d.float(), None if minimum is None else minimum.float()
    if form.name == "Q6_K":
        return d * take(sub).view(torch.int8).float(), None
    if form.scales_nbytes == 0:
        return d, minimum
    assert minimum is not None
    # Of eight groups four have six bits in bytes of their own, the others four in bytes 8 to 11 and two on top of those.
    first, second, mixed = take(sub % 4), take(sub % 4 + 4), take(sub % 4 + 8)
    scales = torch.where(is_early, first & 63, (mixed & 15) | (first >> 2 & 48))
    minima = torch.where(is_early, second & 63, (mixed >> 4) | (second >> 2 & 48))
    return d * scales.float(), -(minimum * minima.float())


def _numbers(codes: Tensor, form: BlockFormat) -> Tensor:
    """Codes as float32, less the centre; those of 8 bits are signed."""
    return (codes.view(torch.int8) if form.bits == 8 else codes).float().sub_(form.centre)


def codes_of(stored: Tensor, form: BlockFormat) -> Tensor:
    """The codes of blocks as they are stored, uint8 [..., codes_nbytes] -> uint8 [..., block], in the order of the weights."""
    if form.bits == 8:
        return stored
    codes: Tensor
    if form.block == UNIT:
        high, low = stored.split((form.codes_nbytes - 16, 16), dim=-1)
        codes = torch.cat((low & 15, low >> 4), dim=-1)
        return codes if form.bits == 4 else codes | _bits(high) << 4
    if form.bits == 6:
        low, high = stored.split((128, 64), dim=-1)
        nibbles: Tensor = low.unflatten(-1, (2, 1, 64))  # halves of 128 weights: two units of low nibbles, then two of high ones
        nibbles = torch.cat((nibbles & 15, nibbles >> 4), dim=-2).flatten(-2).unflatten(-1, (4, 32))
        pairs = torch.stack([high.unflatten(-1, (2, 32)) >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2)
        return (nibbles | pairs << 4).flatten(-3)
    high, low = stored.split((form.codes_nbytes - 128, 128), dim=-1)
    pairs = low.unflatten(-1, (4, 1, 32))
    nibbles = torch.cat((pairs & 15, pairs >> 4), dim=-2).flatten(-3, -2)  # [..., 8, 32]
    if form.bits == 5:
        nibbles = nibbles | torch.stack([high >> group & 1 for group in range(8)], dim=-2) << 4
    return nibbles.flatten(-2)


def _bits(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> their bits from the lowest on, uint8 [..., 8n]."""
    return torch.stack([packed >> bit & 1 for bit in range(8)], dim=-1).flatten(-2)


def regrouped_codes(codes: Tensor, form: BlockFormat) -> Tensor:
    """A neuron's codes, uint8 [..., column_nbytes] -> uint8 [..., D]."""
    if form.bits == 8:
        return codes
    units = codes.unflatten(-1, (-1, form.unit_nbytes))
    low, high = units.split((16, form.unit_nbytes - 16), dim=-1)
    numbers = torch.cat((low & 15, low >> 4), dim=-1)
    if form.bits == 5:
        numbers |= _bits(high) << 4
    elif form.bits == 6:
        numbers |= torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1) << 4
    return numbers.flatten(-2)


def regroup(codes: Tensor, form: BlockFormat) -> Tensor:
    """The reverse: uint8 [..., 32 * units] -> uint8 [..., units * unit_nbytes]."""
    if form.bits == 8:
        return codes
    units = codes.unflatten(-1, (-1, UNIT))
    parts = [units[..., :16] & 15 | units[..., 16:] << 4]
    high = units >> 4
    if form.bits == 5:
        eights = high.unflatten(-1, (4, 8))
        parts.append(sum_of_bits([eights[..., bit] for bit in range(8)], 1))
    elif form.bits == 6:
        parts.append(sum_of_bits(list(high.split(8, dim=-1)), 2))
    return torch.cat(parts, dim=-1).flatten(-2)


def sum_of_bits(parts: list[Tensor], step: int) -> Tensor:
    """Numbers of a few bits each, side by side in a byte from the lowest bits on."""
    total = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        total |= part << step * index
    return total


def write_headers(stored: Tensor, first: int, place: NeuronRows) -> None:
    """What rows of a down projection, uint8 [n, row_nbytes], of outputs first .. first + n, have beside codes, to the table."""
    form, width, last = place.form, place.width, first + len(stored)
    header, _ = split_blocks(stored.unflatten(1, (-1, form.block_nbytes)), form)  # [n, blocks, header_nbytes]
    halves, scales = header.split((form.header_nbytes - form.scales_nbytes, form.scales_nbytes), dim=2)
    for index, half in enumerate(halves.split(HALF_NBYTES, dim=2)):
        plane = place.table[:, HALF_NBYTES * width * index : HALF_NBYTES * width * (index + 1)].unflatten(1, (width, HALF_NBYTES))
        plane[:, first:last].copy_(half.transpose(0, 1))
    if form.scales_nbytes:
        planes = place.table[:, -form.scales_nbytes * width :].unflatten(1, (form.scales_nbytes, width))
        planes[:, :, first:last].copy_(scales.permute(1, 2, 0))


def regroup_reference(stored: Tensor, first: int, place: NeuronRows) -> None:
    """Codes of rows as they are stored, uint8 [n, row_nbytes], of outputs first .. first + n, to the neurons."""
    form, step = place.form, max(REGROUPED_CODES // len(place) // UNIT, 1) * UNIT
    for start in range(0, len(stored), step):
        _, codes = split_blocks(stored[start : start + step].unflatten(1, (-1, form.block_nbytes)), form)
        units = slice((first + start) // UNIT * form.unit_nbytes, (first + start + len(codes)) // UNIT * form.unit_nbytes)
        by_neuron = codes_of(codes, form).flatten(1).t().contiguous()  # [n, F] -> [F, n]
        place.codes[:, units].copy_(regroup(by_neuron, form))
