"""Records of a table, gathered by index into a buffer: a Triton kernel, and beside it the same in plain torch.

The kernel may read a table in pinned host memory: the device then fetches the kept records over the link itself, without a copy
on the host. Triton is imported when the kernel is first called, so that everything else works without it. Knows no layers.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

BLOCK_NBYTES = 8192
"""Of a record, read by a program at once."""

MAX_PROGRAMS = 64
"""Half a MiB under way keeps a link busy whose reads take microseconds, and leaves a GPU to whoever computes beside it: with a
program for each block, products of an H200 waited for the whole of the gathering."""


def has_triton() -> bool:
    """Whether the kernel can be built; without it there is the reference."""
    return find_spec("triton") is not None


def gather_reference(records: Tensor, indices: Tensor, kept: Tensor) -> None:
    """records [F, R], indices int64 [N], kept [N, R] of the same type: row i of kept becomes row indices[i]. Any devices."""
    kept.copy_(records.index_select(0, indices.to(records.device)))


def gather(records: Tensor, indices: Tensor, kept: Tensor) -> None:
    """The same by the kernel, queued on the current stream. indices and kept on the device, records there or pinned on the host.

    All contiguous. Reads whole words of 8 bytes where the records' size and place allow it. Indices are not checked.
    """
    assert records.is_contiguous()
    assert kept.is_contiguous()
    assert indices.dtype == torch.int64
    assert kept.shape == (len(indices), records.shape[1]), (kept.shape, indices.shape, records.shape)
    if kept.numel() == 0:
        return
    word = _widest_word(records, kept)
    words_in, words_out = records.view(word), kept.view(word)  # [F, R] -> [F, words], [N, R] -> [N, words]
    num_words = words_in.shape[1]
    block = BLOCK_NBYTES // word.itemsize
    num_blocks = len(indices) * math.ceil(num_words / block)
    num_programs = min(num_blocks, MAX_PROGRAMS)
    with torch.cuda.device_of(kept):  # the current device is where Triton runs it
        _kernel()[(num_programs,)](words_in, indices, words_out, num_words, num_blocks, num_programs, BLOCK=block)


def _widest_word(records: Tensor, kept: Tensor) -> torch.dtype:
    """Of what can be moved without looking at it: the records' bytes may be anything."""
    row_nbytes = records.shape[1] * records.element_size()
    fits = (row_nbytes, records.data_ptr(), kept.data_ptr())
    words = (torch.int64, torch.int32, torch.int16, torch.uint8)
    return next(word for word in words if all(each % word.itemsize == 0 for each in fits))


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    # No annotations but constexpr: the compiler evaluates them, and knows no names but its own.
    # How many rows are wanted differs from call to call: none is compiled anew for a multiple of 16.
    @triton.jit(do_not_specialize=["num_blocks", "num_programs"])  # type: ignore[untyped-decorator]
    def gather_records(  # type: ignore[no-untyped-def]
        records,
        indices,
        kept,
        num_words,
        num_blocks,
        num_programs,
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        blocks_of_row = tl.cdiv(num_words, BLOCK)
        for block in range(tl.program_id(0), num_blocks, num_programs):
            row = (block // blocks_of_row).to(tl.int64)
            record = tl.load(indices + row)
            words = block % blocks_of_row * BLOCK + tl.arange(0, BLOCK)
            inside = words < num_words
            tl.store(kept + row * num_words + words, tl.load(records + record * num_words + words, mask=inside), mask=inside)

    return gather_records
