"""In which pieces a checkpoint is read."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_sirius.weights.pieces import LINE_NBYTES, PIECE_NBYTES, decoding_nbytes, pieces_of, read_nbytes
from offload_sirius_loaders.checkpoint import Companion, TensorInfo, read_rows

from ..loaders.quantised import WAYS, one_layer

LINE_ROWS = LINE_NBYTES // 4
"""Of float32."""


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
    assert pieces[0].ranges[0].offset == 100
    for before, after in pairwise(pieces):
        assert after.ranges[0].offset == before.ranges[0].offset + before.nbytes
        assert after.first_row % row_multiple == 0
    assert sum(piece.nbytes for piece in pieces) == tensor.nbytes


def test_pieces_are_bounded_unless_rows_must_stay_together() -> None:
    assert PIECE_NBYTES - LINE_ROWS * 4096 * 4 < max(piece.nbytes for piece in pieces_of(info(4096, 4096))) <= PIECE_NBYTES
    assert max(piece.nbytes for piece in pieces_of(info(4096, 4096, 4096))) == 4096 * 4096 * 4


def companion(name: str, num_rows: int, row_nbytes: int, span: int) -> Companion:
    nbytes = num_rows * row_nbytes
    return Companion(name=name, file=Path("y"), offset=1000, nbytes=nbytes, num_rows=num_rows, span=span)


def test_pieces_begin_at_whole_lines_of_a_turned_matrix_where_so_many_rows_fit() -> None:
    assert all(piece.first_row % LINE_ROWS == 0 for piece in pieces_of(info(5000, 4096)))
    wide = PIECE_NBYTES // 4 // (LINE_ROWS - 1)
    assert pieces_of(info(200, wide))[0].num_rows == LINE_ROWS - 1, "a line is more than a piece"


@pytest.mark.parametrize(
    ("ffn_width", "num_rows"), [(5632, 160), (14336, 64), (18944, 32), (28672, 32), (53248, 19)], ids=lambda size: str(size)
)
def test_pieces_of_a_down_projection_in_bfloat16_have_whole_lines_up_to_70b(ffn_width: int, num_rows: int) -> None:
    down = replace(info(4096, ffn_width), dtype="BF16", element="BF16", nbytes=4096 * ffn_width * 2)
    assert pieces_of(down)[0].num_rows == num_rows


def test_each_piece_brings_the_rows_of_companions_that_it_needs() -> None:
    plain = info(5000, 1000)
    tensor = replace(plain, companions=(companion("scales", 40, 8, 128), companion("all", 1, 100, 5000)), transposed=False)
    step = pieces_of(plain)[0].num_rows
    for piece in pieces_of(tensor):
        own, scales, whole = piece.ranges
        assert own.nbytes == piece.num_rows * 4000
        first, end = piece.first_row // 128, -(-(piece.first_row + piece.num_rows) // 128)
        assert scales == (Path("y"), 1000 + 8 * first, 8 * (end - first))
        assert whole == (Path("y"), 1000, 100)
        assert piece.nbytes == own.nbytes + scales.nbytes + 100
    num_pieces = -(-5000 // step)
    assert read_nbytes(tensor) >= plain.nbytes + 40 * 8 + num_pieces * 100
    assert read_nbytes(tensor) == sum(piece.nbytes for piece in pieces_of(tensor))
    assert read_nbytes(plain) == plain.nbytes


def test_a_transposed_tensor_is_cut_along_its_columns() -> None:
    tensor = replace(info(3000, 5000), transposed=True)
    assert sum(piece.num_rows for piece in pieces_of(tensor)) == 5000
    assert all(piece.decoded_nbytes == piece.num_rows * 3000 * 4 <= PIECE_NBYTES for piece in pieces_of(tensor))


@pytest.mark.parametrize("way", WAYS)
def test_decoding_a_piece_takes_no_more_memory_than_is_reserved(way: str, tmp_path: Path) -> None:
    checkpoint = one_layer(WAYS[way], tmp_path, 200, 320)
    tensor = checkpoint.tensors[0, "up"]
    piece = max(pieces_of(tensor), key=lambda piece: piece.nbytes)
    raw = read_rows(tensor, piece.first_row, piece.num_rows)
    tracemalloc.start()
    checkpoint.decode(tensor, raw, piece.first_row, piece.num_rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert piece.decoded_nbytes <= peak <= decoding_nbytes(tensor)
