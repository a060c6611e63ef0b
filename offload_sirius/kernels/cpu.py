"""Products of a few tokens with rows of weights on a CPU, by products.c: float32, bfloat16 or quantised rows. Knows no layers.

torch's matmul of one token reads bfloat16 weights at a fraction of the memory's rate, and has no product for rows of int4
that carry their scales with them.
What a token gives does not depend on the tokens beside it, on the number of rows or on threads, to the bit: a correction of a
window computes what steps of single tokens compute. TABLE
"""

from __future__ import annotations

import ctypes
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from offload_sirius.kernels.native import native
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import BLOCK

Rows = Tensor | QuantizedRows
"""N rows of D weights: float32 or bfloat16 [N, D], strided between rows, or quantised ones."""

Activation = Literal["silu", "gelu", "gelu_tanh"]

_ACTIVATION_IDS: dict[Activation, int] = {"silu": 0, "gelu": 1, "gelu_tanh": 2}
_KIND_IDS: dict[object, int] = {torch.float32: 0, torch.bfloat16: 1, "int8": 2, "int4": 3}

_PLAIN_GROUP_LOG2 = 7
"""Rows without groups are read in pieces of this many weights, as a power of two."""


class _Matrix(ctypes.Structure):
    """products.c's struct matrix."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("group_log2", ctypes.c_int32),
    )


def available() -> bool:
    """Whether the library is there; compiles it where it is not. `native("products").problem` says why there is none."""
    return native("products").library is not None


def linear(x: Tensor, rows: Rows, ids: Tensor | None = None) -> Tensor:
    """y = x rows^T: x [S, D] -> float32 [S, N]. ids: int64 [N], the rows to take; None takes all."""
    x, width = _padded(x), x.shape[1]
    matrix = _matrix(rows, width, ids)
    out = torch.empty(x.shape[0], matrix.num_rows)
    _library().offload_sirius_linear(ctypes.byref(matrix), *_place(x), _count(x), *_place(out), _num_threads())
    return out


def gate_up(x: Tensor, gate: Rows, up: Rows, activation: Activation, ids: Tensor | None = None) -> Tensor:
    """z = activation(x gate^T) * (x up^T): x [S, D] -> float32 [S, N]. ids: int64 [N], the rows to take of both."""
    x, width = _padded(x), x.shape[1]
    gates, ups = _matrix(gate, width, ids), _matrix(up, width, ids)
    assert gates.num_rows == ups.num_rows, (gates.num_rows, ups.num_rows)
    out = torch.empty(x.shape[0], gates.num_rows)
    _library().offload_sirius_gate_up(
        ctypes.byref(gates),
        ctypes.byref(ups),
        _ACTIVATION_IDS[activation],
        *_place(x),
        _count(x),
        *_place(out),
        _num_threads(),
    )
    return out


def down(z: Tensor, rows: Rows, ids: Tensor | None = None) -> Tensor:
    """y = z rows: z [S, N], N rows of D -> float32 [S, D]. ids: int64 [N], the rows that z belongs to; None takes all."""
    z = _contiguous(z)
    width = rows.width if isinstance(rows, QuantizedRows) else rows.shape[1]
    matrix = _matrix(rows, width, ids)
    assert z.shape[1] == matrix.num_rows, (z.shape, matrix.num_rows)
    out = torch.empty(z.shape[0], -(-width // BLOCK) * BLOCK)
    _library().offload_sirius_down(ctypes.byref(matrix), *_place(z), _count(z), *_place(out), _num_threads())
    return out[:, :width]


def quantise_int4(weights: Tensor, rows: QuantizedRows) -> bool:
    """float32 [N, D] into rows that hold zeros, as weights/quant.py does it, by quantise.c. False where there is no library.

    Groups with weights that are not finite get a scale that is not.
    """
    library = native("quantise").library
    if library is None:
        return False
    weights = _contiguous(weights)
    library.offload_sirius_quantise_int4(
        *_place(weights),
        _count(weights),
        ctypes.c_int64(rows.width),
        ctypes.c_int(rows.form.group),
        *_place(rows.rows),
        _num_threads(),
    )
    return True


def _library() -> ctypes.CDLL:
    library = native("products").library
    assert library is not None, native("products").problem
    return library


def _matrix(rows: Rows, width: int, ids: Tensor | None) -> _Matrix:
    """The caller keeps rows and ids alive."""
    if isinstance(rows, QuantizedRows):
        assert rows.width == width, (rows.width, width)
        storage, kind, group_log2 = rows.rows, _KIND_IDS[rows.form.kind], rows.form.group.bit_length() - 1
    else:
        assert rows.shape[1] == width, (rows.shape, width)
        assert rows.stride(1) == 1, rows.stride()
        storage, kind, group_log2 = rows, _KIND_IDS[rows.dtype], _PLAIN_GROUP_LOG2
    assert storage.device.type == "cpu", storage.device
    assert ids is None or (ids.dtype == torch.int64 and ids.is_contiguous()), ids
    return _Matrix(
        rows=storage.data_ptr(),
        stride=storage.stride(0) * storage.element_size(),
        ids=None if ids is None else ids.data_ptr(),
        num_rows=len(storage) if ids is None else len(ids),
        width=width,
        kind=kind,
        group_log2=group_log2,
    )


def _padded(x: Tensor) -> Tensor:
    """[S, D] -> float32, D rounded up to whole blocks with zeros; x itself where it is so already."""
    missing = -x.shape[1] % BLOCK
    return functional.pad(_contiguous(x), (0, missing)) if missing else _contiguous(x)


def _contiguous(x: Tensor) -> Tensor:
    """float32, each row contiguous."""
    x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def _place(x: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64]:
    """Address, and elements from row to row."""
    return ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.stride(0))


def _count(x: Tensor) -> ctypes.c_int64:
    return ctypes.c_int64(x.shape[0])


def _num_threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())
