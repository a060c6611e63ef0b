"""Ways for bytes: what is copied, how much of it, and what is left as it was."""

from __future__ import annotations

import pytest
import torch

from offload_sirius import machine
from offload_sirius.bench import ways
from offload_sirius.bench.ways import ONE_THREAD, arena_nbytes, host_ways, walk_nbytes, ways_of
from offload_sirius.units import KIB, MIB

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("copy_nbytes", "walk"),
    [(64 * KIB, 256 * MIB), (1024 * MIB, 1024 * MIB), (256 * MIB, 256 * MIB), (100 * MIB, 200 * MIB), (3, 256 * MIB - 1)],
)
def test_a_walk_is_whole_copies_and_long_enough_to_be_timed(copy_nbytes: int, walk: int) -> None:
    assert walk_nbytes(copy_nbytes) == walk
    assert walk <= arena_nbytes(copy_nbytes)


@pytest.mark.parametrize("cores", [1, 3])
def test_without_a_gpu_one_thread_copies_and_all_do(cores: int, short_walks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: cores)
    names = [way.name for way in ways_of(CPU, 4 * KIB)]
    assert names == [ONE_THREAD, "memory, 3 threads"][: 1 if cores == 1 else 2]


@pytest.mark.parametrize("copy_nbytes", [4 * KIB, 100 * KIB, 1024 * KIB])
def test_every_byte_of_a_walk_arrives_and_none_beyond(
    copy_nbytes: int, short_walks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = []
    host_bytes = ways.host_bytes

    def watched(nbytes: int) -> torch.Tensor:
        buffers.append(host_bytes(nbytes))
        return buffers[-1]

    monkeypatch.setattr(ways, "host_bytes", watched)
    way = host_ways(arena_nbytes(copy_nbytes) + 8)[0]
    source, destination = buffers
    source.fill_(2)
    threads = torch.get_num_threads()
    way.prepare(copy_nbytes)()
    walk = walk_nbytes(copy_nbytes)
    assert bool((destination[:walk] == 2).all())
    assert bool((destination[walk:] == 1).all())
    assert torch.get_num_threads() == threads
