"""Reader threads: pieces, O_DIRECT and its fallback, and what goes wrong."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offload_sirius.errors import WeightReadError
from offload_sirius.weights import pieces
from offload_sirius.weights.disk import (
    DirectFile,
    Fill,
    Job,
    ReaderPool,
    read_buffers,
    tensor_jobs,
)
from offload_sirius.weights.pieces import BLOCK_NBYTES, buffer_nbytes, part_infos, pieces_of, read_nbytes
from offload_sirius_loaders import by_input
from offload_sirius_loaders.checkpoint import Checkpoint, TensorInfo

from ..loaders.quantised import WAYS, one_layer


@pytest.fixture
def pool(tiny: Checkpoint) -> Iterator[ReaderPool]:
    readers = ReaderPool(tiny, 4)
    yield readers
    readers.close()


def test_what_the_readers_put_in_place_is_what_the_plain_way_reads(pool: ReaderPool, tiny: Checkpoint) -> None:
    for (layer, role), tensor in tiny.tensors.items():
        place = torch.full(tensor.shape, torch.nan)
        pool.submit(tensor_jobs(tensor, place)).wait()
        assert np.array_equal(place.numpy(), tiny.read(layer, role)), tensor.name
    assert pool.nbytes_read == sum(tensor.nbytes for tensor in tiny.tensors.values())
    assert pool.busy_seconds > 0


@pytest.mark.parametrize("way", WAYS)
def test_quantised_matrices_come_in_pieces_with_what_belongs_to_them(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_NBYTES", 8000)
    monkeypatch.setattr(by_input, "GROUP_NBYTES", 1)
    monkeypatch.setattr(by_input, "ANY_ORDER_NBYTES", 1)
    checkpoint = one_layer(WAYS[way], tmp_path, 104, 120)
    tensor, expected = checkpoint.tensors[0, "up"], checkpoint.read(0, "up")
    assert len(pieces_of(tensor)) > 4
    readers = ReaderPool(checkpoint, 2)
    try:
        plain, turned = torch.full((104, 120), torch.nan), torch.full((120, 104), torch.nan)
        seen: list[int] = []
        for place in (plain, turned.t()):
            readers.submit(tensor_jobs(tensor, place), seen.append).wait()
            assert np.array_equal(place.numpy(), expected)
        assert sum(seen) == 2 * read_nbytes(tensor) == readers.nbytes_read
    finally:
        readers.close()


def test_progress_adds_up_to_the_stored_bytes(pool: ReaderPool, tiny: Checkpoint) -> None:
    tensor = tiny.tensors[0, "gate"]
    seen: list[int] = []
    pool.submit(tensor_jobs(tensor, torch.empty(tensor.shape)), seen.append).wait()
    assert sum(seen) == tensor.nbytes


def test_readers_that_have_no_memory_for_settings_read_all_the_same(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_: int) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "set_num_threads", no_memory)
    readers = ReaderPool(tiny, 2)
    try:
        info = tiny.tensors[None, "embedding"]
        place = torch.full(info.shape, torch.nan)
        readers.submit(tensor_jobs(info, place)).wait()
        assert torch.isfinite(place).all()
    finally:
        readers.close()


def test_a_fill_begins_when_the_first_of_its_pieces_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 20.0, 30.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    fill = Fill(2)
    assert fill.began == 10.0
    fill.piece_taken()
    fill.piece_taken()
    assert fill.began == 20.0


def test_an_empty_fill_is_over_at_once(pool: ReaderPool) -> None:
    pool.submit([]).wait()


def test_when_over_calls_once_whether_it_is_over_or_not() -> None:
    calls: list[str] = []
    fill = Fill(1)
    fill.when_over(lambda: calls.append("before"))
    fill.piece_done(1)
    fill.when_over(lambda: calls.append("after"))
    assert calls == ["before", "after"]


@pytest.mark.parametrize("moment", range(1, 12))
def test_an_interruption_anywhere_in_waiting_leaves_nothing_locked(moment: int) -> None:
    fill, num_events = Fill(1), 0
    fill.piece_done(1)

    def interrupt(frame: Any, event: str, argument: Any) -> Any:
        nonlocal num_events
        num_events += 1
        if num_events == moment:
            raise KeyboardInterrupt
        return interrupt

    sys.settrace(interrupt)
    try:
        fill.wait()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    again = threading.Thread(target=fill.wait, daemon=True)
    again.start()
    again.join(timeout=10)
    assert not again.is_alive()


def test_closing_twice_is_harmless(tiny: Checkpoint) -> None:
    readers = ReaderPool(tiny, 2)
    readers.close()
    readers.close()


class CountedReads:
    """Stands before the read of a file: how many there are, and a moment at which the first of them waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num, self.began, self.may_go_on = 0, threading.Event(), threading.Event()
        real = DirectFile.read

        def read(file: DirectFile, offset: int, nbytes: int, buffer: memoryview) -> Any:
            self.num += 1
            if self.num == 1:
                self.began.set()
                assert self.may_go_on.wait(timeout=30)
            return real(file, offset, nbytes, buffer)

        monkeypatch.setattr(DirectFile, "read", read)


def rows_of(path: Path, num_rows: int, row_nbytes: int, offset: int = 0) -> TensorInfo:
    """A tensor of float32 that lies somewhere in a file."""
    shape, nbytes = (num_rows, row_nbytes // 4), num_rows * row_nbytes
    return TensorInfo(name="t", dtype="F32", element="F32", shape=shape, file=path, offset=offset, nbytes=nbytes)


def files_of_numbers(tmp_path: Path, num_files: int, nbytes: int) -> dict[Path, npt.NDArray[np.float32]]:
    files = {tmp_path / f"{number}": np.arange(nbytes // 4, dtype=np.float32) + number for number in range(num_files)}
    for path, numbers in files.items():
        path.write_bytes(numbers.tobytes())
    return files


def behind(pool: ReaderPool, blocker: TensorInfo, reads: CountedReads) -> Fill:
    """Keep the only reader of a pool busy until reads.may_go_on, so that what is asked for in between is queued."""
    fill = pool.submit(tensor_jobs(blocker, torch.empty(blocker.shape)))
    assert reads.began.wait(timeout=30)
    return fill


@pytest.fixture
def alone(tiny: Checkpoint) -> Iterator[ReaderPool]:
    """A pool of one reader."""
    readers = ReaderPool(tiny, 1)
    yield readers
    readers.close()


def room_of(tiny: Checkpoint) -> int:
    return len(read_buffers(1, buffer_nbytes(tiny))[0]) - 2 * BLOCK_NBYTES


def test_a_layer_takes_as_few_reads_as_its_bytes_need(
    tiny: Checkpoint, alone: ReaderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = CountedReads(monkeypatch)
    jobs = [job for info in part_infos(tiny, 1, "attention") for job in tensor_jobs(info, torch.empty(info.shape))]
    first = behind(alone, tiny.tensors[None, "final_norm"], reads)
    layer = alone.submit(reversed(jobs))
    reads.may_go_on.set()
    first.wait()
    layer.wait()
    nbytes = sum(job.piece.nbytes for job in jobs)
    assert reads.num - 1 == -(-nbytes // room_of(tiny)) < len(jobs)
    assert alone.nbytes_read == nbytes + tiny.tensors[None, "final_norm"].nbytes


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_for_together_all_bytes_are_right(tiny: Checkpoint, tmp_path: Path, data: st.DataObject) -> None:
    files = files_of_numbers(tmp_path, 2, 300_000)
    pool = ReaderPool(tiny, data.draw(st.integers(1, 3)))
    wanted: list[tuple[Fill, torch.Tensor, npt.NDArray[np.float32]]] = []
    try:
        for _ in range(data.draw(st.integers(1, 6))):
            jobs: list[Job] = []
            places: list[tuple[torch.Tensor, npt.NDArray[np.float32]]] = []
            path = data.draw(st.sampled_from(sorted(files)))
            end = 0
            for _ in range(data.draw(st.integers(1, 8))):
                width, count = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 20))
                start = end + data.draw(st.sampled_from([0, 0, 0, 8, 4096, 9000, -min(end, 400)]))
                end = start + 4 * width * count
                if end > 300_000:
                    break
                place = torch.full((count, width), torch.nan)
                jobs += tensor_jobs(rows_of(path, count, 4 * width, start), place)
                places.append((place, files[path][start // 4 : end // 4].reshape(count, width)))
            fill = pool.submit(data.draw(st.permutations(jobs)), urgent=data.draw(st.booleans()))
            wanted += [(fill, *each) for each in places]
        for fill, place, expected in wanted:
            fill.wait()
            assert np.array_equal(place.numpy(), expected)
        assert pool.nbytes_read == sum(place.nbytes for _, place, _ in wanted)
    finally:
        pool.close()


def test_urgent_rows_are_not_read_along_with_what_is_not(
    tiny: Checkpoint, alone: ReaderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = files_of_numbers(tmp_path, 1, 40_000)
    reads = CountedReads(monkeypatch)
    behind(alone, tiny.tensors[None, "final_norm"], reads)
    rest, row = rows_of(path, 2, 4000, 4000), rows_of(path, 1, 4000)
    order: list[str] = []
    fills = [
        alone.submit(tensor_jobs(rest, torch.empty(rest.shape)), lambda _: order.append("rest")),
        alone.submit(tensor_jobs(row, torch.empty(row.shape)), lambda _: order.append("row"), urgent=True),
    ]
    reads.may_go_on.set()
    for fill in fills:
        fill.wait()
    assert (reads.num - 1, order) == (2, ["row", "rest"])


def test_a_read_for_several_fills_that_fails_reaches_all_of_them_and_its_buffer_is_used_again(
    tiny: Checkpoint, alone: ReaderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = files_of_numbers(tmp_path, 1, 40_000)
    reads = CountedReads(monkeypatch)
    behind(alone, tiny.tensors[None, "final_norm"], reads)
    with monkeypatch.context() as broken:
        infos = [rows_of(path, 2, 4000, 8000 * number) for number in range(3)]
        fills = [alone.submit(tensor_jobs(info, torch.empty(info.shape))) for info in infos]
        real = os.preadv

        def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            if os.readlink(f"/proc/self/fd/{descriptor}") == str(path):
                raise OSError(errno.EIO, "Input/output error")
            return real(descriptor, buffers, offset)

        broken.setattr(os, "preadv", fail)
        reads.may_go_on.set()
        for fill in fills:
            with pytest.raises(WeightReadError, match="Input/output error"):
                fill.wait()
    assert reads.num == 2
    place = torch.empty(infos[0].shape)
    alone.submit(tensor_jobs(infos[0], place)).wait()
    assert place.flatten().tolist() == list(range(2000))


def test_a_piece_that_cannot_be_put_in_place_fails_alone(
    tiny: Checkpoint, alone: ReaderPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = files_of_numbers(tmp_path, 1, 40_000)
    reads = CountedReads(monkeypatch)
    behind(alone, tiny.tensors[None, "final_norm"], reads)
    infos = [rows_of(path, 2, 4000, 8000 * number) for number in range(2)]
    too_small, place = torch.empty(1, 10), torch.empty(infos[1].shape)
    bad, good = (alone.submit(tensor_jobs(info, each)) for info, each in zip(infos, (too_small, place), strict=True))
    reads.may_go_on.set()
    with pytest.raises((AssertionError, RuntimeError)):
        bad.wait()
    good.wait()
    assert place.flatten().tolist() == list(range(2000, 4000))
    alone.submit(tensor_jobs(infos[0], torch.empty(infos[0].shape))).wait()


def written(tmp_path: Path, nbytes: int) -> tuple[Path, bytes]:
    content = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8).tobytes()
    path = tmp_path / "file"
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 1), (0, 4096), (1, 8191), (4095, 2), (5000, 7345), (12344, 1)])
def test_any_range_is_read_exactly(tmp_path: Path, offset: int, nbytes: int) -> None:
    path, content = written(tmp_path, 12345)
    file = DirectFile(path)
    buffer = read_buffers(1, nbytes + 2 * BLOCK_NBYTES)[0]
    assert file.read(offset, nbytes, buffer).tobytes() == content[offset : offset + nbytes]
    file.close()


def test_a_file_system_that_refuses_o_direct_at_opening_is_read_buffered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = written(tmp_path, 9000)
    real_open = os.open

    def refuse(path: Path, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    file = DirectFile(path)
    assert not file.direct
    assert file.read(10, 8000, read_buffers(1, 20000)[0]).tobytes() == content[10:8010]


def test_a_file_system_that_refuses_o_direct_at_reading_is_read_buffered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = written(tmp_path, 9000)
    real_preadv = os.preadv
    file = DirectFile(path)

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if file.direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    assert file.read(10, 8000, read_buffers(1, 20000)[0]).tobytes() == content[10:8010]
    assert not file.direct


def test_readers_that_are_refused_o_direct_at_the_same_time_all_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = written(tmp_path, 90_000)
    real_preadv, num_readers = os.preadv, 6
    file = DirectFile(path)
    together = threading.Barrier(num_readers)
    refused = threading.local()

    def refuse(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if not getattr(refused, "already", False):
            refused.already = True
            together.wait(timeout=30)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse)
    buffers = read_buffers(num_readers, 30_000)
    with ThreadPoolExecutor(num_readers) as executor:
        read = list(executor.map(lambda n: file.read(1000 * n, 20_000, buffers[n]).tobytes(), range(num_readers)))
    assert read == [content[1000 * n : 1000 * n + 20_000] for n in range(num_readers)]
    file.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, content = written(tmp_path, 20000)
    real_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real_preadv(fd, [buffers[0][:4096]], offset))
    assert DirectFile(path).read(10, 15000, read_buffers(1, 30000)[0]).tobytes() == content[10:15010]


def test_a_file_that_was_truncated_after_it_was_opened_is_named(pool: ReaderPool, tiny: Checkpoint) -> None:
    tensor = tiny.tensors[0, "down"]
    assert tensor.file is not None
    with tensor.file.open("rb+") as file:
        content = file.read()
        file.truncate(tensor.offset + tensor.nbytes - 1)
    try:
        with pytest.raises(WeightReadError, match=r"\.safetensors: ends at byte \d+, byte \d+ is needed; the file was changed"):
            pool.submit(tensor_jobs(tensor, torch.empty(tensor.shape))).wait()
    finally:
        tensor.file.write_bytes(content)


def test_a_read_error_reaches_who_waits(pool: ReaderPool, tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    tensor = tiny.tensors[0, "down"]
    with pytest.raises(WeightReadError, match="cannot be read: Input/output error; check the disk and the file"):
        pool.submit(tensor_jobs(tensor, torch.empty(tensor.shape))).wait()


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightReadError, match="gone: cannot be read: No such file or directory"):
        DirectFile(tmp_path / "gone")


def test_read_buffers_are_aligned_large_enough_and_apart() -> None:
    buffers = read_buffers(3, 5_000_000)
    addresses = [np.frombuffer(buffer, np.uint8).ctypes.data for buffer in buffers]
    assert all(address % BLOCK_NBYTES == 0 for address in addresses)
    assert all(len(buffer) >= 5_000_000 for buffer in buffers)
    assert all(after - before >= 5_000_000 for before, after in pairwise(addresses))
