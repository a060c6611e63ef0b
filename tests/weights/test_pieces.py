"""In which pieces a checkpoint is read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.weights.pieces import PIECE_NBYTES, pieces_of
from offload_sirius_loaders.checkpoint import TensorInfo


def info(rows: int, columns: int, row_multiple: int = 1) -> TensorInfo:
    return TensorInfo(
        name="t",
        dtype="F32",
        element="F32",
        shape=(rows, columns),
        file=Path("x"),
        offset=100,
        nbytes=rows * columns * 4,
        row_multiple=row_multiple,
    )


@given(st.integers(1, 5000), st.integers(1, 3000), st.sampled_from([1, 2, 64, 128]))
def test_pieces_cover_a_tensor_once_and_in_order(rows: int, columns: int, row_multiple: int) -> None:
    tensor = info(rows * row_multiple, columns, row_multiple)
    pieces = pieces_of(tensor)
    assert pieces[0].offset == 100
    for before, after in pairwise(pieces):
        assert after.offset == before.offset + before.nbytes
        assert after.first_row % row_multiple == 0
    assert sum(piece.nbytes for piece in pieces) == tensor.nbytes


def test_pieces_are_bounded_unless_rows_must_stay_together() -> None:
    assert PIECE_NBYTES - 4096 * 4 < max(piece.nbytes for piece in pieces_of(info(4096, 4096))) <= PIECE_NBYTES
    assert max(piece.nbytes for piece in pieces_of(info(4096, 4096, 4096))) == 4096 * 4096 * 4
