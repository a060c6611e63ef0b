"""Host memory taken from the system as it is: anonymous pages of exactly the size asked for. Knows nothing of what goes in.

Not torch's allocator, whose pinned memory is rounded up to a power of two, up to twice what a model needs. Private, aligned to
huge pages where the system has some (shared anonymous memory, Python's default, gets none on most systems), and on a machine of
several NUMA nodes placed on the node of whoever reads it.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform

import numpy as np

HUGE_PAGE_NBYTES = 2 << 20

_MBIND = {"x86_64": 237, "aarch64": 235}
"""Number of the system call, which libc has no function for."""

_MPOL_PREFERRED = 1
"""Take pages from the node, and from others when it is full: a slower page is better than none."""


def map_memory(nbytes: int, *, node: int | None = None) -> memoryview:
    """Map uint8 [nbytes], starting at a huge page; not touched yet, so no memory is taken. Freed with its last view.

    node: NUMA node that the pages come from when they are first touched; None leaves it to the system. Raises OSError (ENOMEM)
    where the system refuses.
    """
    if nbytes == 0:
        return memoryview(bytearray())
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    lead = -address_of(memoryview(memory)) % HUGE_PAGE_NBYTES
    view = memoryview(memory)[lead : lead + nbytes]
    if node is not None:
        prefer_node(view, node)
    return view


def address_of(view: memoryview) -> int:
    """Where a view that is not empty starts in memory."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def prefer_node(view: memoryview, node: int) -> bool:
    """Have pages of a mapped view come from a NUMA node when they are first touched. False where the system refuses: the pages
    then come from anywhere, which costs rate and nothing else. view: starts at a page."""
    call = _MBIND.get(platform.machine())
    if call is None:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    mask = ctypes.c_ulong(1 << node)
    status = libc.syscall(
        ctypes.c_long(call),
        ctypes.c_void_p(address_of(view)),
        ctypes.c_ulong(len(view)),
        ctypes.c_int(_MPOL_PREFERRED),
        ctypes.byref(mask),
        ctypes.c_ulong(8 * ctypes.sizeof(mask)),
        ctypes.c_uint(0),
    )
    return int(status) == 0
