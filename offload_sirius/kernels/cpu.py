"""Products of a few tokens with rows of weights on a CPU: float32, bfloat16 or quantised rows. Knows no layers.

tiles.c computes where the CPU multiplies matrices of bfloat16 by itself (AMX) and rows are not float32, products.c elsewhere.
Both keep weights exact. What a token gives does not depend on the tokens beside it, on the number of rows or on threads, to the
bit: the products of a correction are those of steps of single tokens.

Seconds of one core, as a share of what torch's linear takes in bfloat16 (matrix of 5632 x 2048, a Xeon with AMX, tokens of
bfloat16; in brackets billions of weights a second). The least of some twenty short runs of each, in turn, beside other work;
benchmarks/products.py measures all of it anew.

                             1 token        16 tokens
    linear  torch bf16       1     (4.8)    1     (4.6)
            tiles bf16       1.15           1.10
            tiles int8/64    0.44 (10.9)    0.54  (8.5)
            tiles int4/128   0.25 (19.3)    0.33 (14.0)
            tiles int4/32    0.43 (11.2)    0.55  (8.4)
            products int8    0.44           1.61
            products int4    0.32           1.49
    down    torch bf16       1.24-2.2       1.22-1.65
            tiles bf16       1.47           1.36
            tiles int8/64    0.47 (10.1)    0.70  (6.6)
            tiles int4/128   0.29 (16.4)    0.52  (8.8)
            tiles int4/32    0.48 (10.0)    0.85  (5.4)
            products int4    0.25           1.38

Tokens of float32 take three products in place of one, which with 16 tokens costs a tenth to a fifth more, as turning integers
into bfloat16 takes most of the time. With 64 tokens quantised rows take about as long as torch's bfloat16 in linear, and longer
in down. Rows of float32 take 0.55 to 1.3 of the time of torch's float32, by shape and number of tokens; layers leave them to
torch.

Tried beside this: torch's _weight_int4pack_mm_for_cpu and _weight_int8pack_mm, which were no faster than products.c and want
whole matrices in an order of their own. AVX512's products of bfloat16 run at half the rate of float32's. Blocks of 128 neurons
for down leave the nearest cache, blocks of 32 add too often: both a fifth slower. torch.compile was not tried.
"""

from __future__ import annotations

import ctypes
from functools import cache
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

_READABLE = (torch.float32, torch.bfloat16)
"""What tokens may be for tiles.c."""

_PLAIN_GROUP_LOG2 = 7
"""Rows without groups are read in pieces of this many weights, as a power of two."""


class _Matrix(ctypes.Structure):
    """products.c's struct matrix."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("group_log2", ctypes.c_int32),
    )


def available() -> bool:
    """Whether the library is there; compiles it where it is not. `native("products").problem` says why there is none."""
    return native("products").library is not None


def linear(x: Tensor, rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    """y = x rows^T: x [S, D] -> [S, N], computed in float32."""
    matrix = _matrix(rows, x.shape[1])
    unit = _tiles_for(matrix)
    if unit is None:
        return _linear(x, matrix).to(dtype)
    x = _readable(x)
    out = torch.empty(x.shape[0], matrix.num_rows, dtype=dtype if dtype in _READABLE else torch.float32)
    packed = _operand(x)
    unit.offload_sirius_tiles_linear(
        ctypes.byref(matrix), *_place(x), packed.data_ptr(), *_place(out)[:3], torch.get_num_threads()
    )
    return out if out.dtype == dtype else out.to(dtype)


def gate_up(x: Tensor, gate: Rows, up: Rows, activation: Activation, dtype: torch.dtype = torch.float32) -> Tensor:
    """z = activation(x gate^T) * (x up^T): x [S, D] -> [S, N], computed in float32."""
    gates, ups = _matrix(gate, x.shape[1]), _matrix(up, x.shape[1])
    assert gates.num_rows == ups.num_rows, (gates.num_rows, ups.num_rows)
    unit = _tiles_for(gates)
    if unit is None or _tiles_for(ups) is None:
        return _gate_up(x, gates, ups, activation).to(dtype)
    x = _readable(x)
    out = torch.empty(x.shape[0], gates.num_rows, dtype=dtype if dtype in _READABLE else torch.float32)
    packed = _operand(x)
    unit.offload_sirius_tiles_gate_up(
        ctypes.byref(gates),
        ctypes.byref(ups),
        _ACTIVATION_IDS[activation],
        *_place(x),
        packed.data_ptr(),
        *_place(out)[:3],
        torch.get_num_threads(),
    )
    return out if out.dtype == dtype else out.to(dtype)


def down(z: Tensor, rows: Rows) -> Tensor:
    """y = z rows: z [S, N], N rows of D -> float32 [S, D]."""
    width = rows.width if isinstance(rows, QuantizedRows) else rows.shape[1]
    if z.shape[0] == 0:
        return torch.zeros(0, width)
    matrix = _matrix(rows, width)
    assert z.shape[1] == matrix.num_rows, (z.shape, matrix.num_rows)
    out = torch.empty(z.shape[0], -(-width // BLOCK) * BLOCK)
    if unit := _tiles_for(matrix):
        z = _readable(z)
        unit.offload_sirius_tiles_down(ctypes.byref(matrix), *_place(z), out.data_ptr(), out.stride(0), torch.get_num_threads())
    else:
        z = _contiguous(z)
        _library().offload_sirius_down(
            ctypes.byref(matrix), z.data_ptr(), z.stride(0), z.shape[0], out.data_ptr(), out.stride(0), torch.get_num_threads()
        )
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
        ctypes.c_void_p(weights.data_ptr()),
        ctypes.c_int64(weights.stride(0)),
        ctypes.c_int64(weights.shape[0]),
        ctypes.c_int64(rows.width),
        ctypes.c_int(rows.form.group),
        ctypes.c_void_p(rows.rows.data_ptr()),
        ctypes.c_int64(rows.rows.stride(0)),
        ctypes.c_int(torch.get_num_threads()),
    )
    return True


@cache
def tiles() -> ctypes.CDLL | None:
    """tiles.c, where this CPU has what it takes, and this process may use it."""
    library = native("tiles").library
    if library is None or not library.offload_sirius_tiles_ready():
        return None
    matrix, address, number, integer = ctypes.POINTER(_Matrix), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    tokens = (address, integer, number, number)
    library.offload_sirius_tiles_linear.argtypes = (matrix, *tokens, address, address, integer, number, integer)
    gated = (matrix, matrix, integer, *tokens, address, address, integer, number, integer)
    library.offload_sirius_tiles_gate_up.argtypes = gated
    library.offload_sirius_tiles_down.argtypes = (matrix, *tokens, address, number, integer)
    return library


def _linear(x: Tensor, matrix: _Matrix) -> Tensor:
    """By products.c, float32."""
    x = _padded(x)
    out = torch.empty(x.shape[0], matrix.num_rows)
    _library().offload_sirius_linear(
        ctypes.byref(matrix), x.data_ptr(), x.stride(0), x.shape[0], out.data_ptr(), out.stride(0), torch.get_num_threads()
    )
    return out


def _gate_up(x: Tensor, gates: _Matrix, ups: _Matrix, activation: Activation) -> Tensor:
    """By products.c, float32."""
    x = _padded(x)
    out = torch.empty(x.shape[0], gates.num_rows)
    _library().offload_sirius_gate_up(
        ctypes.byref(gates),
        ctypes.byref(ups),
        _ACTIVATION_IDS[activation],
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        out.data_ptr(),
        out.stride(0),
        torch.get_num_threads(),
    )
    return out


def _tiles_for(matrix: _Matrix) -> ctypes.CDLL | None:
    """Rows of float32 would be three times as much work in bfloat16 as their tokens' numbers make it."""
    return tiles() if matrix.kind != _KIND_IDS[torch.float32] else None


def _place(x: Tensor) -> tuple[int, int, int, int]:
    """Address, kind, bytes from token to token, number of tokens."""
    return x.data_ptr(), _KIND_IDS[x.dtype], x.stride(0) * x.element_size(), x.shape[0]


def _readable(x: Tensor) -> Tensor:
    """float32 or bfloat16, each row contiguous."""
    if x.dtype not in _READABLE:
        x = x.float()
    return x if x.stride(1) == 1 else x.contiguous()


def _operand(x: Tensor) -> Tensor:
    """Room for the tokens as tiles.c packs them."""
    num_tokens, width = x.shape
    num_parts = 1 if x.dtype == torch.bfloat16 else 3
    num_columns = 1 if num_tokens == 1 else -(-num_tokens // 16) * 16
    packed = torch.empty(-(-width // BLOCK) * BLOCK * num_columns * num_parts, dtype=torch.bfloat16)
    assert packed.data_ptr() % 64 == 0, packed.data_ptr()
    return packed


def _library() -> ctypes.CDLL:
    library = native("products").library
    assert library is not None, native("products").problem
    return _declared(library)


@cache
def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The same, knowing what its functions take."""
    matrix, address, number = ctypes.POINTER(_Matrix), ctypes.c_void_p, ctypes.c_int64
    arguments = (address, number, number, address, number, ctypes.c_int)
    library.offload_sirius_linear.argtypes = (matrix, *arguments)
    library.offload_sirius_gate_up.argtypes = (matrix, matrix, ctypes.c_int, *arguments)
    library.offload_sirius_down.argtypes = (matrix, *arguments)
    return library


def _matrix(rows: Rows, width: int) -> _Matrix:
    """The caller keeps rows alive."""
    if isinstance(rows, QuantizedRows):
        assert rows.width == width, (rows.width, width)
        storage, kind, group_log2 = rows.rows, _KIND_IDS[rows.form.kind], rows.form.group.bit_length() - 1
    else:
        assert rows.shape[1] == width, (rows.shape, width)
        assert rows.stride(1) == 1, rows.stride()
        storage, kind, group_log2 = rows, _KIND_IDS[rows.dtype], _PLAIN_GROUP_LOG2
    assert storage.device.type == "cpu", storage.device
    return _Matrix(
        rows=storage.data_ptr(),
        stride=storage.stride(0) * storage.element_size(),
        num_rows=storage.shape[0],
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
