"""Reader threads: a checkpoint's tensors from disk to their place in host memory. Knows no layers, no slots, no link.

Files are read past the page cache (O_DIRECT), many pieces at a time: weights that exceed memory would only push each other out
of the cache, and one copy through it costs half the disk's rate. Where the file system refuses O_DIRECT, reads are buffered.
Several threads rather than an asynchronous interface: a blocking pread releases the interpreter's lock, and others turn what has
been read into its place meanwhile.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offload_sirius.errors import WeightReadError
from offload_sirius.kernels import rows as row_kernels
from offload_sirius.kernels.block_products import write_outputs
from offload_sirius.kernels.blocks import BlockRows, NeuronRows
from offload_sirius.kernels.matrix import Matrix
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.machine import physical_cores
from offload_sirius.weights.buffers import write_rows
from offload_sirius.weights.depth import DepthTuner
from offload_sirius.weights.layout import align
from offload_sirius.weights.mapping import HUGE_PAGE_NBYTES, map_memory
from offload_sirius.weights.pieces import BLOCK_NBYTES, PIECE_NBYTES, Piece, buffer_nbytes, pieces_of
from offload_sirius_loaders.checkpoint import ByteRange, Checkpoint, TensorInfo

GAP_NBYTES = 2 * BLOCK_NBYTES
"""Bytes that nobody asked for and that are read all the same, where that saves a read: what aligns the next tensor of a file."""

PLACER_NICENESS = 10
"""Scheduling priority of threads that put pieces in place below that of whoever computes, on Linux's scale of 0 to 19. Measured
with as many compute threads as cores: passes from disk took 1.1 times the disk's own time, and 1.4 times at equal priority."""


@dataclass(frozen=True)
class Job:
    """A piece and where it goes."""

    piece: Piece
    place: Tensor | NeuronRows
    """As buffers.write_rows takes it; or neurons among which the rows of a down projection in blocks are spread."""
    row: int
    """Row of the place at which the piece starts."""


def tensor_jobs(info: TensorInfo, place: Matrix) -> list[Job]:
    """Everything there is to read of a tensor. place: all of the tensor's rows."""
    assert not isinstance(place, QuantizedRows), info.name
    if isinstance(place, BlockRows):
        place = place.rows
    stored = place.t() if isinstance(place, Tensor) and info.transposed else place
    return [Job(piece, stored, piece.first_row) for piece in pieces_of(info)]


class Fill:
    """A number of pieces on their way to their places. Over when each is there or has failed."""

    def __init__(self, num_pieces: int, on_bytes: Callable[[int], None] | None = None) -> None:
        self._left = num_pieces
        self._lock = threading.Lock()
        self._over = self._told = num_pieces == 0
        self._latch = threading.Lock()
        """Held until all is told. Not an Event: where Ctrl-C reaches one between two of its steps, its lock stays held."""
        self._error: BaseException | None = None
        self._on_bytes = on_bytes
        self._when_over: list[Callable[[], None]] = []
        self.began = time.perf_counter()
        """When the first of its pieces was taken by a reader; until then, when it was asked for."""
        self._taken = False
        if not self._over:
            self._latch.acquire()

    def wait(self) -> None:
        """Block until everything is in place and all calls of `when_over` are done. Raises WeightReadError (or what else a reader
        met)."""
        if not self._told:
            self._latch.acquire()
            self._latch.release()
        if self._error is not None:
            raise self._error

    def when_over(self, call: Callable[[], None]) -> None:
        """Call once when the fill is over, by the thread that ends it, or now if it is over already."""
        with self._lock:
            if not self._over:
                self._when_over.append(call)
                return
        call()

    def piece_taken(self) -> None:
        """A reader turns to a piece. One reader at a time."""
        if not self._taken:
            self._taken, self.began = True, time.perf_counter()

    def piece_done(self, nbytes: int) -> None:
        """A reader has put nbytes in place."""
        if self._on_bytes is not None:
            self._on_bytes(nbytes)
        self._piece_over(None)

    def piece_failed(self, error: BaseException) -> None:
        """A reader could not: everyone who waits learns why, once no other reader writes to these places any more."""
        self._piece_over(error)

    def _piece_over(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self._end()

    def _end(self) -> None:
        with self._lock:
            calls, self._when_over = self._when_over, []
            self._over = True
        try:
            for call in calls:
                call()
        finally:
            self._told = True
            self._latch.release()


class DirectFile:
    """A file read past the page cache, buffered where that is refused. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._opened: list[int] = []
        """Descriptors, all kept until the end: others may be reading from one that is not read from any more."""
        try:
            self._opened.append(os.open(path, os.O_RDONLY | os.O_DIRECT))
            self._direct: int | None = self._opened[0]
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise _unreadable(path, error) from error
            self._direct = None
            self._open_buffered()

    @property
    def direct(self) -> bool:
        """Whether it is read past the page cache."""
        return self._opened[-1] == self._direct

    def _open_buffered(self) -> None:
        try:
            self._opened.append(os.open(self.path, os.O_RDONLY))
        except OSError as error:
            raise _unreadable(self.path, error) from error

    def read(self, offset: int, nbytes: int, buffer: memoryview) -> npt.NDArray[np.uint8]:
        """Read [offset, offset + nbytes) into the page-aligned buffer, of at least nbytes + 2 blocks. Returns a view of it."""
        lead = offset % BLOCK_NBYTES
        start = offset - lead
        length = -(-(lead + nbytes) // BLOCK_NBYTES) * BLOCK_NBYTES
        view = buffer[:length]
        count = 0
        while count < lead + nbytes:
            read = self._read_some(view[count:], start + count)
            if read == 0:
                raise WeightReadError(
                    f"{self.path}: ends at byte {start + count}, byte {offset + nbytes} is needed; "
                    "the file was changed while it was in use: start again"
                )
            count += read
        return np.frombuffer(buffer, np.uint8, nbytes, lead)

    def _read_some(self, view: memoryview, offset: int) -> int:
        descriptor = self._opened[-1]
        try:
            return os.preadv(descriptor, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL or descriptor != self._direct:
                raise _unreadable(self.path, error) from error
        # Some file systems accept the flag and refuse the read, or part of one (a short read leaves an unaligned rest).
        with self._lock:  # several readers may be told so at once
            if self.direct:
                self._open_buffered()
        return self._read_some(view, offset)

    def close(self) -> None:
        """Close the file."""
        for descriptor in self._opened:
            os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> WeightReadError:
    return WeightReadError(f"{path}: cannot be read: {error.strerror}; check the disk and the file")


def read_buffers(count: int, nbytes: int) -> list[memoryview]:
    """Page-aligned buffers to read into, of at least nbytes each, in huge pages where the system has some.

    A disk takes a limited number of pieces of memory with one request. Small pages are scattered over memory, more so the longer
    a machine runs, and one read of some MiB then becomes many requests: such reads were seen to take 1.7 times as long.
    """
    step = align(nbytes, HUGE_PAGE_NBYTES) if nbytes > HUGE_PAGE_NBYTES // 2 else align(nbytes, BLOCK_NBYTES)
    view = map_memory(count * step)
    # Touched now and by one thread: pages that many threads bring in at the same time come from all over memory.
    np.frombuffer(view, np.uint8)[::BLOCK_NBYTES] = 0
    return [view[index * step : (index + 1) * step] for index in range(count)]


@dataclass(frozen=True)
class _Asked:
    """A job in the queue."""

    job: Job
    fill: Fill
    ranges: list[ByteRange]
    """Of its piece."""
    urgent: bool

    @property
    def position(self) -> tuple[str, int]:
        """Where it begins on the disk; before all others where nothing is stored."""
        return (str(self.ranges[0].file), self.ranges[0].offset) if self.ranges else ("", 0)


class _Batch:
    """Jobs whose pieces one read brings, and the buffer into which it brings them."""

    def __init__(self, buffer: memoryview, first: _Asked) -> None:
        self.buffer = buffer
        self.asked = [first]
        self.num_left = 0
        """Pieces that have been read and are not in place yet."""

    @property
    def nbytes(self) -> int:
        """Stored bytes of its pieces."""
        return sum(each.job.piece.nbytes for each in self.asked)

    def accepts(self, asked: _Asked) -> bool:
        """Whether the same read can bring this job, too: it lies behind the last one of the same file, and the buffer has room.

        Urgent jobs do not wait for others.
        """
        last = self.asked[-1]
        # A range more is a companion, which lies elsewhere.
        if not len(last.ranges) == len(asked.ranges) == 1 or last.urgent != asked.urgent:
            return False
        before, behind = last.ranges[0], asked.ranges[0]
        gap = behind.offset - before.offset - before.nbytes
        whole_nbytes = behind.offset + behind.nbytes - self.asked[0].ranges[0].offset
        return before.file == behind.file and 0 <= gap <= GAP_NBYTES and whole_nbytes + 2 * BLOCK_NBYTES <= len(self.buffer)


class ReaderPool:
    """Threads that read pieces of one checkpoint, in the order they were asked for, as many at a time as is fastest.

    Pieces that lie one behind the other in a file, and follow each other in the queue, are one read where a buffer holds them: a
    read of a few KiB takes a turn as any other. A layer's norms and the last pieces of its matrices are such; passes became 5 %
    shorter. Cutting pieces so that every read fills its buffer brought nothing more.

    Others, as many as there are cores, turn what has been read into its place. Readers only wait for the disk, and ask it for the
    next piece as soon as they have one: where they put it in place themselves, a disk that likes few reads at a time idles.
    """

    def __init__(self, checkpoint: Checkpoint, num_readers: int) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, DirectFile] = {}
        self._queue: deque[_Asked] = deque()
        self._mutex = threading.Lock()
        self._wake = threading.Condition(self._mutex)
        """Told where a reader has something to do."""
        self._arrived: deque[tuple[_Batch, _Asked, npt.NDArray[np.uint8]]] = deque()
        self._arrival = threading.Condition(self._mutex)
        """Told of pieces that have been read, and at the end."""
        self._reading = 0
        self._closed = self._all_read = False
        self._tuner = DepthTuner(num_readers)
        self.nbytes_read = 0
        """Stored bytes read so far."""
        self.busy_seconds = 0.0
        """Time in which at least one read was under way."""
        self._busy_since = 0.0
        # Made here and not by the threads, so that memory that runs out is an error of whoever opens the pool.
        self._free = read_buffers(num_readers, buffer_nbytes(checkpoint))
        """Buffers that nobody reads into. The last one given back is taken next: it is nearer to the cores than the others."""
        row_kernels.library()  # compiled, if it has to be, before many threads ask for it
        self._readers = [
            threading.Thread(target=self._read_all, name=f"reader-{index}", daemon=True) for index in range(num_readers)
        ]
        self._placers = [
            threading.Thread(
                target=self._place_all, args=(torch.empty(PIECE_NBYTES, dtype=torch.uint8),), name=f"placer-{index}", daemon=True
            )
            for index in range(min(num_readers, physical_cores()))
        ]
        try:
            for thread in (*self._placers, *self._readers):
                thread.start()
        except RuntimeError:  # no more threads: those that run would wait for work for ever
            self.close()
            raise

    @property
    def bytes_per_second(self) -> float | None:
        """Best rate of reading seen over a stretch of many pieces, None before there was one."""
        return self._tuner.best_bytes_per_second

    def retune(self) -> None:
        """Look for the best queue depth anew: loading writes to memory for the first time, which makes its rates others."""
        with self._wake:
            self._tuner.restart(self.busy_seconds)

    def submit(self, jobs: Iterable[Job], on_bytes: Callable[[int], None] | None = None, *, urgent: bool = False) -> Fill:
        """Queue jobs, behind all others or (urgent) before them, in the order of the files they are read from. Returns at once;
        on_bytes is called as pieces are in place."""
        queued = list(jobs)
        fill = Fill(len(queued), on_bytes)
        asked = sorted((_Asked(job, fill, job.piece.ranges, urgent) for job in queued), key=lambda each: each.position)
        with self._mutex:  # not the condition, which keeps its lock where Ctrl-C comes as it is entered
            if urgent:
                self._queue.extendleft(reversed(asked))
            else:
                self._queue.extend(asked)
            self._wake_reader()
        return fill

    def close(self) -> None:
        """Drop what is queued, wait for reads under way, end the threads, close the files. Safe to call twice."""
        with self._wake:
            self._closed = True
            self._queue.clear()
            self._wake.notify_all()
        self._join(self._readers)
        with self._arrival:
            self._all_read = True
            self._arrival.notify_all()
        self._join(self._placers)
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._free.clear()

    def _join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        threads.clear()

    def _read_all(self) -> None:
        """A reader."""
        with self._wake:
            batch = self._take()
        while batch is not None:
            asked = batch.asked
            try:
                raws = self._read(batch)
            except BaseException as error:
                with self._wake:
                    self._end_read(batch.nbytes)
                    self._free.append(batch.buffer)
                with ExitStack() as all_told:  # whoever is told may fail; the others are told all the same
                    for each in reversed(asked):
                        all_told.callback(each.fill.piece_failed, error)
                with self._wake:
                    batch = self._take()
            else:
                with self._wake:  # once: whoever has read pieces begins with the next before anybody else is woken
                    self._end_read(batch.nbytes)
                    batch.num_left = len(raws)
                    self._arrived.extend((batch, each, raw) for each, raw in zip(asked, raws, strict=True))
                    self._arrival.notify(len(raws))
                    batch = self._take()

    def _place_all(self, scratch: Tensor) -> None:
        """One who puts pieces in place."""
        # Where memory has run out settings fail, and pieces are put in place all the same: who waits has the better message.
        with suppress(MemoryError, RuntimeError, OSError):
            # Copies of a piece are short: one thread each, or each of these would bring up a team of its own on the same cores.
            torch.set_num_threads(1)
            # The disk is what is waited for, not the few milliseconds in which a piece is put in place; the matmuls, whose
            # threads wait for each other, lose a time slice with every one of theirs that is pushed off its core.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PLACER_NICENESS)
        while (arrived := self._next_arrived()) is not None:
            batch, asked, raw = arrived
            try:
                try:
                    self._put(asked.job, raw, scratch)
                finally:
                    self._piece_left(batch)
                asked.fill.piece_done(asked.job.piece.nbytes)
            except BaseException as error:  # of who is told of bytes, too
                asked.fill.piece_failed(error)

    def _next_arrived(self) -> tuple[_Batch, _Asked, npt.NDArray[np.uint8]] | None:
        with self._arrival:
            while not self._arrived and not self._all_read:
                self._arrival.wait()
            return self._arrived.popleft() if self._arrived else None

    def _piece_left(self, batch: _Batch) -> None:
        """A piece needs the buffer no more. With the last one of them it is free."""
        with self._wake:
            batch.num_left -= 1
            if batch.num_left == 0:
                self._free.append(batch.buffer)
                self._wake_reader()

    def _take(self) -> _Batch | None:
        """What to read next, the beginning of the queue, and a buffer for it; None at the end. Waits, with the lock that the
        caller holds."""
        while not self._closed and not self._may_read:
            self._wake.wait()
        if self._closed:
            return None
        if self._reading == 0:
            self._busy_since = time.perf_counter()
        self._reading += 1
        batch = _Batch(self._free.pop(), self._queue.popleft())
        while self._queue and batch.accepts(self._queue[0]):
            batch.asked.append(self._queue.popleft())
        for asked in batch.asked:
            asked.fill.piece_taken()
        self._wake_reader()
        return batch

    @property
    def _may_read(self) -> bool:
        return bool(self._queue and self._free) and self._reading < self._tuner.depth

    def _wake_reader(self) -> None:
        """One more, if it has something to do: it wakes the next. With the lock."""
        if self._may_read:
            self._wake.notify()

    def _end_read(self, nbytes: int) -> None:
        """Count a read. With the lock."""
        now = time.perf_counter()
        self._reading -= 1
        self.nbytes_read += nbytes
        # Busy time is counted in slices that end with each read, so that it is right while reads are under way.
        self.busy_seconds += now - self._busy_since
        self._busy_since = now
        self._tuner.record(nbytes, self.busy_seconds)

    def _read(self, batch: _Batch) -> list[npt.NDArray[np.uint8]]:
        """The bytes of each piece: views of the buffer."""
        if len(batch.asked) == 1:
            return [self._read_ranges(batch.asked[0].ranges, batch.buffer)]
        ranges = [asked.ranges[0] for asked in batch.asked]
        first, last = ranges[0], ranges[-1]
        raw = self._file(first.file).read(first.offset, last.offset + last.nbytes - first.offset, batch.buffer)
        return [raw[offset - first.offset :][:nbytes] for _, offset, nbytes in ranges]

    def _read_ranges(self, ranges: list[ByteRange], buffer: memoryview) -> npt.NDArray[np.uint8]:
        """The bytes of all ranges one behind the other, none where there are none: a view of the buffer."""
        if not ranges:
            return np.empty(0, np.uint8)
        first, *others = ranges
        raw = self._file(first.file).read(first.offset, first.nbytes, buffer)
        if not others:
            return raw
        whole = np.frombuffer(buffer, np.uint8)
        start = first.offset % BLOCK_NBYTES
        end = start + first.nbytes
        for file, offset, nbytes in others:
            # Each to a block of its own, then up to those before: they are small.
            whole[end : end + nbytes] = self._file(file).read(offset, nbytes, buffer[align(end, BLOCK_NBYTES) :])
            end += nbytes
        return whole[start:end]

    def _file(self, path: Path) -> DirectFile:
        with self._wake:
            if path not in self._files:
                self._files[path] = DirectFile(path)
            return self._files[path]

    def _put(self, job: Job, raw: npt.NDArray[np.uint8], scratch: Tensor) -> None:
        piece = job.piece
        rows = torch.from_numpy(self._checkpoint.decode(piece.info, raw, piece.first_row, piece.num_rows))
        if piece.info.element == "BF16":
            rows = rows.view(torch.bfloat16)
        if isinstance(job.place, NeuronRows):
            write_outputs(job.place, job.row, rows)
            return
        write_rows(job.place, job.row, rows, scratch)
