"""In which pieces a checkpoint is read, and what reading takes: arithmetic over its headers. Opens no file, knows no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from offload_sirius.weights.layout import Part, align, part_of
from offload_sirius.weights.mapping import HUGE_PAGE_NBYTES
from offload_sirius.weights.plan import NUM_QUANTISING, Plan
from offload_sirius_loaders.checkpoint import Checkpoint, TensorInfo
from offload_sirius_loaders.spec import ModelSpec, Role

BLOCK_NBYTES = 4096
"""O_DIRECT wants offset, length and address as multiples of the logical block size, which is at most this."""

PIECE_NBYTES = 2 * HUGE_PAGE_NBYTES - 2 * BLOCK_NBYTES
"""One read, and also the most bytes a piece may have once decoded: bounds what a reader thread holds. With the blocks at both
ends that O_DIRECT reads along, it fills its huge pages."""


@dataclass(frozen=True)
class Piece:
    """Some rows of one tensor: the unit of reading."""

    info: TensorInfo
    first_row: int
    num_rows: int

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.info.offset + self.first_row * self.info.row_nbytes

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.num_rows * self.info.row_nbytes


def pieces_of(info: TensorInfo) -> list[Piece]:
    """Cut a tensor into pieces of at most PIECE_NBYTES, stored and decoded, where its rows allow it."""
    element_nbytes = 4 if info.element == "F32" else 2
    columns = info.shape[-1]
    per_row = max(columns * element_nbytes, info.row_nbytes, 1)
    step = max(PIECE_NBYTES // per_row // info.row_multiple, 1) * info.row_multiple
    return [Piece(info, start, min(step, info.num_rows - start)) for start in range(0, info.num_rows, step)]


def reader_nbytes(checkpoint: Checkpoint) -> int:
    """Host memory one reader thread holds at most: its buffer, and a decoded piece with what decoding needs beside it.

    piece = bytes of the largest piece (a tensor whose rows must stay together may exceed PIECE_NBYTES)
    blocks = quantised blocks pass through float32 arrays, about four at a time in the gguf library
    """
    buffer = align(largest_piece_nbytes(checkpoint) + 2 * BLOCK_NBYTES, HUGE_PAGE_NBYTES)
    blocks = any(info.dtype not in ("F32", "F16", "BF16") for info in checkpoint.tensors.values())
    return buffer + PIECE_NBYTES * (4 if blocks else 1)


def largest_piece_nbytes(checkpoint: Checkpoint) -> int:
    """Stored bytes of the largest piece of any tensor."""
    return max(max(piece.nbytes for piece in pieces_of(info)) for info in checkpoint.tensors.values())


def largest_matrix_nbytes(spec: ModelSpec, element_nbytes: int) -> int:
    """Bytes of the largest matrix of a layer before it is quantised."""
    return element_nbytes * max(prod(shape) for shape in spec.layer_roles().values())


def quantising_nbytes(spec: ModelSpec, element_nbytes: int) -> int:
    """Host memory of matrices that are read before they are quantised."""
    return NUM_QUANTISING * largest_matrix_nbytes(spec, element_nbytes)


def load_nbytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Stored bytes that `Loader` will read, for a progress bar."""
    layers = plan.resident_layers + plan.host_layers[: plan.num_host_buffers]
    roles: list[Role] = ["final_norm", head_role(checkpoint)]
    if plan.embedding_place == "host":
        roles.append("embedding")
    infos = [checkpoint.tensors[None, role] for role in roles]
    infos += [checkpoint.tensors[layer, role] for layer in layers for role in checkpoint.spec.layer_roles()]
    return sum(info.nbytes for info in infos)


def stored_part_nbytes(checkpoint: Checkpoint, layer: int, part: Part) -> int:
    """Bytes that are read from disk for a part of a layer, in the type in which they are stored."""
    roles = (role for role in checkpoint.spec.layer_roles() if part_of(role) == part)
    return sum(checkpoint.tensors[layer, role].nbytes for role in roles)


def head_role(checkpoint: Checkpoint) -> Role:
    """The tensor that is the head: its own, or the embedding table where the two are tied."""
    return "embedding" if checkpoint.spec.tied_head else "head"
