"""Products of a few tokens with rows of blocks on a CPU, by blocks.c. Knows no layers.

What a token gives does not depend on the tokens beside it, on the number of rows or on threads, to the bit.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from offload_sirius.blocks import BLOCK_NAMES, UNIT
from offload_sirius.kernels.blocks import BlockRows, NeuronRows
from offload_sirius.kernels.native import native


class _Rows(ctypes.Structure):
    """blocks.c's struct rows."""

    _fields_ = (
        ("bytes", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    )


class _Neurons(ctypes.Structure):
    """blocks.c's struct neurons."""

    _fields_ = (
        ("numbers", ctypes.c_void_p),
        ("codes", ctypes.c_void_p),
        ("table", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("table_stride", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
    )


def available() -> bool:
    """Whether the library is there; compiles it where it is not. `native("blocks").problem` says why there is none."""
    return native("blocks").library is not None


def linear(x: Tensor, rows: BlockRows) -> Tensor:
    """y = x rows^T: x [S, D] -> float32 [S, N]."""
    assert x.shape[1] == rows.width, (x.shape, rows.width)
    x, out = _contiguous(x), torch.empty(len(x), len(rows))
    _library().offload_sirius_block_linear(
        ctypes.byref(_rows(rows)), x.data_ptr(), x.stride(0), len(x), out.data_ptr(), out.stride(0), torch.get_num_threads()
    )
    return out


def down(z: Tensor, rows: NeuronRows) -> Tensor:
    """y = z rows: z [S, N] -> float32 [S, D]."""
    assert z.shape[1] == len(rows), (z.shape, len(rows))
    z, out = _contiguous(z), torch.empty(len(z), rows.width)
    _library().offload_sirius_block_down(
        ctypes.byref(_neurons(rows)), z.data_ptr(), z.stride(0), len(z), out.data_ptr(), out.stride(0), torch.get_num_threads()
    )
    return out


def weights(rows: BlockRows | NeuronRows) -> Tensor:
    """The weights that rows stand for, float32 [N, D]."""
    out = torch.empty(len(rows), rows.width)
    if isinstance(rows, BlockRows):
        _library().offload_sirius_block_weights(ctypes.byref(_rows(rows)), out.data_ptr(), torch.get_num_threads())
    else:
        _library().offload_sirius_neuron_weights(ctypes.byref(_neurons(rows)), out.data_ptr(), torch.get_num_threads())
    return out


def regroup(stored: Tensor, first: int, rows: NeuronRows) -> None:
    """Codes of rows of a down projection as stored, uint8 [n, row_nbytes], of outputs first .. first + n, to the neurons.

    By the thread that calls: it is one of many that read.
    """
    assert stored.is_contiguous()
    neurons = _neurons(rows)
    neurons.codes += first // UNIT * rows.form.unit_nbytes
    _library().offload_sirius_regroup(
        ctypes.byref(neurons), stored.data_ptr(), stored.shape[1], len(stored), stored.shape[1] // rows.form.block_nbytes
    )


def _library() -> ctypes.CDLL:
    library = native("blocks").library
    assert library is not None, native("blocks").problem
    return _declared(library)


@cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The same, knowing what its functions take."""
    rows, neurons = ctypes.POINTER(_Rows), ctypes.POINTER(_Neurons)
    address, number = ctypes.c_void_p, ctypes.c_int64
    arguments = (address, number, number, address, number, ctypes.c_int)
    library.offload_sirius_block_linear.argtypes = (rows, *arguments)
    library.offload_sirius_block_down.argtypes = (neurons, *arguments)
    library.offload_sirius_block_weights.argtypes = (rows, address, ctypes.c_int)
    library.offload_sirius_regroup.argtypes = (neurons, address, number, number, number)
    library.offload_sirius_neuron_weights.argtypes = (neurons, address, ctypes.c_int)
    return library


def _rows(rows: BlockRows) -> _Rows:
    """The caller keeps them alive."""
    assert rows.rows.device.type == "cpu", rows.rows.device
    return _Rows(
        bytes=rows.rows.data_ptr(),
        stride=rows.rows.stride(0),
        num_rows=len(rows),
        width=rows.width,
        kind=BLOCK_NAMES.index(rows.form.name),
    )


def _neurons(rows: NeuronRows) -> _Neurons:
    """The caller keeps them alive."""
    assert rows.codes.device.type == "cpu", rows.codes.device
    stride = rows.codes.stride(0)
    assert rows.numbers.stride(0) * rows.numbers.element_size() == stride or len(rows) <= 1, (rows.numbers.stride(), stride)
    return _Neurons(
        numbers=rows.numbers.data_ptr(),
        codes=rows.codes.data_ptr(),
        table=rows.table.data_ptr(),
        stride=stride,
        table_stride=rows.table.stride(0),
        num_blocks=len(rows.table),
        num_rows=len(rows),
        width=rows.width,
        kind=BLOCK_NAMES.index(rows.form.name),
    )


def _contiguous(x: Tensor) -> Tensor:
    """float32, each row contiguous."""
    x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()
