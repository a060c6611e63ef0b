"""In which pieces a checkpoint is read, and what reading takes: arithmetic over its headers. Opens no file, knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod
from typing import get_args

from offload_sirius.blocks import BLOCK_FORMATS, BlockFormat
from offload_sirius.weights.layout import PARTS, Part, align, part_of
from offload_sirius.weights.mapping import HUGE_PAGE_NBYTES
from offload_sirius.weights.plan import NUM_QUANTISING, Plan, ReadingCost
from offload_sirius_loaders.checkpoint import ByteRange, Checkpoint, Decoded, PackedLayers, TensorInfo
from offload_sirius_loaders.spec import ModelSpec, Role

BLOCK_NBYTES = 4096
"""O_DIRECT wants offset, length and address as multiples of the logical block size, which is at most this."""

PIECE_NBYTES = HUGE_PAGE_NBYTES - 2 * BLOCK_NBYTES
"""The most bytes of a piece, stored and once decoded: bounds what a reader holds. With the blocks at both ends that O_DIRECT
reads along it fills a huge page. Measured on a virtual disk, passes of a model beside plain reads of 4 MiB: 0.92 of their time
with this, 1.06 to 1.17 with twice as much, and 1.11 with half of it for twice the work of the cores."""

LINE_NBYTES = 64
"""Of a line of the cache: turned, a piece of as many rows as its numbers fill it with writes whole lines."""

LEAST_SHARE = 0.5
"""Of the largest piece, what one of whole lines has to be."""


@dataclass(frozen=True)
class Piece:
    """Some stored rows of one tensor: the unit of reading."""

    info: TensorInfo
    first_row: int
    num_rows: int

    @property
    def ranges(self) -> list[ByteRange]:
        """Where its bytes are; none where nothing is stored."""
        return self.info.ranges(self.first_row, self.num_rows)

    @property
    def nbytes(self) -> int:
        """Bytes to read. Pieces that share rows of a companion each read them."""
        own = self.num_rows * self.info.row_nbytes
        return own + sum(each.range(self.first_row, self.num_rows).nbytes for each in self.info.companions)

    @property
    def decoded_nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.num_rows * self.info.stored_shape[-1] * _element_nbytes(self.info)


def pieces_of(info: TensorInfo) -> list[Piece]:
    """Cut a tensor into pieces of at most PIECE_NBYTES, stored (companions apart) and decoded, where its rows allow it."""
    per_row = max(info.stored_shape[-1] * _element_nbytes(info), info.row_nbytes, 1)
    most = PIECE_NBYTES // per_row
    whole_lines = lcm(info.row_multiple, LINE_NBYTES // _element_nbytes(info))
    # Reads that are much smaller would cost more than turning lines in parts does.
    multiple = whole_lines if most // whole_lines * whole_lines >= LEAST_SHARE * most > 0 else info.row_multiple
    step = max(most // multiple, 1) * multiple
    return [Piece(info, start, min(step, info.num_rows - start)) for start in range(0, info.num_rows, step)]


_ELEMENT_NBYTES: dict[Decoded, int] = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


def _element_nbytes(info: TensorInfo) -> int:
    return _ELEMENT_NBYTES[info.element]


def reading_cost(checkpoint: Checkpoint, num_cores: int) -> ReadingCost:
    """Host memory for readers at most: a buffer for each, and for each who puts pieces in place room to turn one, and a decoded
    piece with what decoding needs beside it."""
    return ReadingCost(
        reader_nbytes=align(buffer_nbytes(checkpoint), HUGE_PAGE_NBYTES),
        placer_nbytes=PIECE_NBYTES + max(decoding_nbytes(info) for info in checkpoint.infos),
        num_cores=num_cores,
    )


def decoding_nbytes(info: TensorInfo) -> int:
    """Host memory that decoding a piece takes at most.

    plain and packed = nothing, its numbers are its bytes
    GGUF blocks = about three float32 arrays beside the result, in the gguf library; where they are kept, rows in another order,
        or codes of a down projection a few times over, some at a time
    companions = numbers, and a quarter of that for their codes, with some room; stored by rows of the matrix also scales spread
        over them, or places in a table of 8-bit floats; each companion once more in a type of its own
    """
    if info.companions:
        halves = 3 if info.transposed else 6
        return max(halves * piece.decoded_nbytes // 2 + 2 * piece.nbytes for piece in pieces_of(info))
    if info.element == "U8":
        return 0 if info.dtype == "U8" else PIECE_NBYTES
    return 0 if info.dtype in get_args(Decoded) else 3 * PIECE_NBYTES


def buffer_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes of the buffer into which any piece can be read: O_DIRECT reads whole blocks, and each range starts at one."""
    num_blocks = 4 if any(info.companions for info in checkpoint.infos) else 2
    return largest_piece_nbytes(checkpoint) + num_blocks * BLOCK_NBYTES


def largest_piece_nbytes(checkpoint: Checkpoint) -> int:
    """Stored bytes of the largest piece of any tensor."""
    return max(max(piece.nbytes for piece in pieces_of(info)) for info in checkpoint.infos)


def largest_matrix_nbytes(spec: ModelSpec, element_nbytes: int) -> int:
    """Bytes of the largest matrix of a layer before it is quantised."""
    return element_nbytes * max(prod(shape) for shape in spec.layer_roles().values())


def quantising_nbytes(spec: ModelSpec, element_nbytes: int) -> int:
    """Host memory of matrices that are read before they are quantised."""
    return NUM_QUANTISING * largest_matrix_nbytes(spec, element_nbytes)


def blocks_of(checkpoint: Checkpoint, layer: int | None) -> dict[Role, BlockFormat]:
    """Matrices of a layer, or outside of layers, that are kept in their blocks."""
    if checkpoint.packed is not None and layer is not None:
        kinds = checkpoint.packed.blocks[layer] if checkpoint.packed.blocks else {}
        return {role: BLOCK_FORMATS[kinds[role]] for role in checkpoint.spec.layer_roles() if role in kinds}
    infos = {role: info for (owner, role), info in checkpoint.tensors.items() if owner == layer}
    return {
        role: BLOCK_FORMATS[info.dtype] for role, info in infos.items() if info.element == "U8" and info.dtype in BLOCK_FORMATS
    }


def blocks_by_layer(checkpoint: Checkpoint) -> list[dict[Role, BlockFormat]]:
    """The same of every layer."""
    return [blocks_of(checkpoint, layer) for layer in range(checkpoint.spec.num_layers)]


def read_nbytes(info: TensorInfo) -> int:
    """Bytes that are read for a whole tensor: the stored ones, those of companions as often as pieces share them."""
    return sum(piece.nbytes for piece in pieces_of(info)) if info.companions else info.nbytes


def load_nbytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Stored bytes that `Loader` will read, for a progress bar."""
    layers = plan.resident_layers + plan.host_layers[: plan.num_host_buffers]
    roles: list[Role] = ["final_norm", head_role(checkpoint)]
    if plan.embedding_place == "host":
        roles.append("embedding")
    infos = [checkpoint.tensors[None, role] for role in roles]
    infos += [info for layer in layers for part in PARTS for info in part_infos(checkpoint, layer, part)]
    return sum(read_nbytes(info) for info in infos)


def stored_part_nbytes(checkpoint: Checkpoint, layer: int, part: Part) -> int:
    """Bytes that are read from disk for a part of a layer, in the type in which they are stored."""
    return sum(read_nbytes(info) for info in part_infos(checkpoint, layer, part))


def part_infos(checkpoint: Checkpoint, layer: int, part: Part) -> list[TensorInfo]:
    """What is stored of a part of a layer: its tensors, or where layers are packed the one range of bytes that it is."""
    if checkpoint.packed is not None:
        return [packed_part(checkpoint.packed, layer, part)]
    return [checkpoint.tensors[layer, role] for role in checkpoint.spec.layer_roles() if part_of(role) == part]


def packed_part(packed: PackedLayers, layer: int, part: Part) -> TensorInfo:
    """The bytes of a part of a packed layer. No slices: those are gathered in memory."""
    assert part == "attention" or part == "records", part
    return packed.parts[layer, part]


def head_role(checkpoint: Checkpoint) -> Role:
    """The tensor that is the head: its own, or the embedding table where the two are tied and the head is not packed apart."""
    if checkpoint.packed is not None and checkpoint.packed.quantize_head != "none":
        return "head"
    return "embedding" if checkpoint.spec.tied_head else "head"
