"""Rows of numbers to their place on a CPU, as they are or turned, by rows.c. Knows no layers and no checkpoints.

Seconds of a core for a GB (pieces of 4 MiB that are in no cache, bfloat16, a Xeon with AVX-512): turned 0.10, by torch 0.85;
as they are 0.09, by torch 0.14. Without AVX-512 words are turned in 0.27.
"""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor

from offload_sirius.kernels.native import native


@cache
def library() -> ctypes.CDLL | None:
    """rows.c, compiled where it was not; None where there is no compiler."""
    found = native("rows").library
    if found is None:
        return None
    address, number = ctypes.c_void_p, ctypes.c_int64
    found.offload_sirius_copy_rows.argtypes = (address, number, address, number, number, number)
    found.offload_sirius_turn_rows.argtypes = (address, number, address, number, number, number, ctypes.c_int)
    for function in (found.offload_sirius_copy_rows, found.offload_sirius_turn_rows):
        function.restype = None
    return found


def put_rows(place: Tensor, rows: Tensor) -> bool:
    """Write rows [n, C], each contiguous, to a place [n, C] of the same type of which rows or columns are contiguous.

    Both in host memory. Returns whether it was done: not without the library, between types, or for other places.
    """
    functions, size = library(), rows.element_size()
    if functions is None or place.dtype != rows.dtype or place.device.type != "cpu" or rows.dim() != 2 or rows.stride(1) != 1:
        return False
    assert place.shape == rows.shape, (place.shape, rows.shape)
    num_rows, width = rows.shape
    begin = rows.data_ptr(), rows.stride(0) * size
    if place.stride(1) == 1:
        if place.is_contiguous() and rows.is_contiguous():
            num_rows, width = 1, num_rows * width  # short rows one by one take longer
        functions.offload_sirius_copy_rows(place.data_ptr(), place.stride(0) * size, *begin, num_rows, width * size)
        return True
    if place.stride(0) == 1 and size in (2, 4):
        functions.offload_sirius_turn_rows(place.data_ptr(), place.stride(1) * size, *begin, num_rows, width, size)
        return True
    return False
