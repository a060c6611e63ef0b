"""Memory mapped from the system."""

from __future__ import annotations

import ctypes
import platform

import numpy as np
import pytest

from offload_sirius.weights.mapping import HUGE_PAGE_NBYTES, address_of, map_memory, prefer_node

_GET_MEMPOLICY = {"x86_64": 239, "aarch64": 236}
_MPOL_F_ADDR = 2


@pytest.mark.parametrize("nbytes", [1, 4096, HUGE_PAGE_NBYTES, 3 * HUGE_PAGE_NBYTES + 5])
def test_memory_has_the_size_asked_for_and_starts_at_a_huge_page(nbytes: int) -> None:
    view = map_memory(nbytes)
    assert len(view) == nbytes
    assert address_of(view) % HUGE_PAGE_NBYTES == 0
    view[-1] = 7
    assert np.frombuffer(view, np.uint8)[-1] == 7


def test_nothing_is_mapped_for_nothing() -> None:
    assert len(map_memory(0)) == 0


def test_two_mappings_do_not_overlap() -> None:
    one, other = map_memory(5000), map_memory(5000)
    one[:] = b"\1" * 5000
    other[:] = b"\2" * 5000
    assert set(bytes(one)) == {1}


@pytest.mark.skipif(platform.machine() not in _GET_MEMPOLICY, reason="the number of the system call is not known")
def test_pages_prefer_the_node_they_are_asked_to_come_from() -> None:
    view = map_memory(HUGE_PAGE_NBYTES)
    if not prefer_node(view, 0):
        pytest.skip("this system has no memory policies")
    mode, mask = ctypes.c_int(-1), ctypes.c_ulong(0)
    status = ctypes.CDLL(None, use_errno=True).syscall(
        ctypes.c_long(_GET_MEMPOLICY[platform.machine()]),
        ctypes.byref(mode),
        ctypes.byref(mask),
        ctypes.c_ulong(64),
        ctypes.c_void_p(address_of(view)),
        ctypes.c_ulong(_MPOL_F_ADDR),
    )
    assert (status, mode.value, mask.value) == (0, 1, 1)


def test_a_node_that_does_not_exist_costs_nothing_but_the_placing() -> None:
    view = map_memory(4096, node=62)
    view[0] = 1
    assert not prefer_node(view, 62)
