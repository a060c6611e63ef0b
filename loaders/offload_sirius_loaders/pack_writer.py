"""Writes a packed model's folder: file by file, each whole or not at all, and the index last. What was interrupted goes on.

A folder is a packed model when it has an index. Until then a marker says what is being written there; files that are whole are
checked and kept, and the others written. Knows neither layers nor how their bytes are made.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from offload_sirius_loaders.arch import generation_json
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.pack_file import (
    OutTensor,
    PackFile,
    Seal,
    damaged_pieces,
    is_partial,
    read_file,
    seal_of,
    sync_folder,
    write_file,
    write_small_file,
)
from offload_sirius_loaders.pack_index import (
    GGUF_TOKENIZER_NAME,
    INDEX_NAME,
    MARKER_NAME,
    OUTSIDE_NAME,
    PackIndex,
    PackJob,
    layer_file_name,
    marker_text,
    read_index,
    read_marker,
)
from offload_sirius_loaders.packed import ELEMENT_OF_DTYPE, outside_tensors, part_tensor
from offload_sirius_loaders.safetensors import TOKENIZER_FILES
from offload_sirius_loaders.writer import GIB, SPARE_NBYTES, checked_config


class PackWriter:
    """A folder while it becomes a packed model. One process at a time; close it at the end."""

    def __init__(self, directory: Path, job: PackJob, checkpoint: Checkpoint) -> None:
        """Look at the folder, and make it where it is not there.

        checkpoint: what is packed. Raises CheckpointError where the folder is something else, in use, or its disk too small.
        """
        self._directory = directory
        self._job = job
        self._checkpoint = checkpoint
        # First, as it may raise: a model that cannot be described must not be begun.
        self._config = checked_config(checkpoint.spec, ELEMENT_OF_DTYPE[job.dtype], directory)
        self._tensors = _files(checkpoint, job)
        self._seals: dict[str, Seal] = {}
        self._unchecked: dict[str, PackFile] = {}
        """Files of an earlier run, which may not be whole."""
        self._descriptor: int | None = None
        try:
            self.is_finished = self._begin()
            """Whether the folder was complete already."""
        except OSError as error:
            self.close()
            raise self._unwritable(error) from error
        except BaseException:
            self.close()
            raise

    @property
    def unchecked_nbytes(self) -> int:
        """What `resume` reads."""
        return sum(file.data_nbytes for file in self._unchecked.values())

    def resume(self, on_bytes: Callable[[int], None]) -> None:
        """Check what an earlier run has left, and that there is room for the rest; on_bytes is called by several threads.

        Raises CheckpointError where the disk is too small.
        """
        damaged = [file for file, _ in damaged_pieces(list(self._unchecked.values()), on_bytes)]
        whole = {name: file for name, file in self._unchecked.items() if file not in damaged}
        self._seals |= {name: seal_of(file.path, file.head_nbytes) for name, file in whole.items()}
        self._unchecked = {}
        if not self.is_finished:
            self._require_space()

    @property
    def missing(self) -> list[str]:
        """Names of the files with tensors that are still to be written, in order. Known when the rest has been checked."""
        return [] if self.is_finished else [name for name in self._tensors if name not in self._seals]

    def tensors(self, name: str) -> Sequence[OutTensor]:
        """What such a file holds."""
        return self._tensors[name]

    def write(self, name: str, contents: Sequence[Iterable[memoryview]], notes: Mapping[str, str] | None = None) -> None:
        """Write one of them, the bytes of each tensor piece by piece. Raises CheckpointError where the disk refuses."""
        path = self._directory / name
        try:
            write_file(path, list(zip(self._tensors[name], contents, strict=True)), notes)
        except OSError as error:
            raise self._unwritable(error) from error
        self._seals[name] = seal_of(path, read_file(path).head_nbytes)

    def finish(self) -> None:
        """Write everything else, and then the index, which makes the folder a model. Raises CheckpointError."""
        assert not self.missing
        if self.is_finished:
            return
        try:
            for name, content in self._small_files().items():
                write_small_file(self._directory / name, content)
                self._seals[name] = seal_of(self._directory / name)
            index = PackIndex(job=self._job, num_byte_ids=self._checkpoint.tokenizer.num_bytes_ids, seals=self._seals)
            write_small_file(self._directory / INDEX_NAME, index.to_text())
            self._remove_marker()
        except OSError as error:
            raise self._unwritable(error) from error
        self.is_finished = True

    def close(self) -> None:
        """Let others write to the folder. Safe to call twice."""
        if self._descriptor is not None:
            os.close(self._descriptor)  # and with it the lock
            self._descriptor = None

    def _begin(self) -> bool:
        """Whether the folder is finished already."""
        self._make_folder()
        self._descriptor = _locked(self._directory)
        if (self._directory / INDEX_NAME).is_file():
            index = read_index(self._directory)
            self._require_same(index.job, "is a packed copy")
            if self._has_all(index):
                self._remove_marker()
                return True
            write_small_file(self._directory / MARKER_NAME, marker_text(self._job))
            (self._directory / INDEX_NAME).unlink()  # no model any more, until it is whole again
        self._begin_or_go_on()
        return False

    def _make_folder(self) -> None:
        if self._directory.is_dir():
            return
        if os.path.lexists(self._directory):
            raise CheckpointError(f"{self._directory}: is a file; give a folder that does not exist")
        if not self._directory.parent.is_dir():
            raise CheckpointError(f"{self._directory}: its parent folder does not exist; create it first")
        self._require_space()  # before there is a folder: nothing is left behind where there is no room
        self._directory.mkdir()
        sync_folder(self._directory.parent)

    def _begin_or_go_on(self) -> None:
        marker = self._directory / MARKER_NAME
        if marker.is_file():
            self._require_same(read_marker(self._directory), "is an unfinished packed copy")
            for path in filter(is_partial, self._directory.iterdir()):
                path.unlink()  # somebody was killed in the middle of it
            self._unchecked = {name: file for name in self._tensors if (file := self._found(name)) is not None}
            return
        left = list(self._directory.iterdir())
        if not all(is_partial(path) and path.name.startswith(f".{MARKER_NAME}.") for path in left):
            raise CheckpointError(f"{self._directory}: exists and is no packed copy; give a folder that does not exist")
        for path in left:
            path.unlink()  # somebody was killed before there was a marker
        write_small_file(marker, marker_text(self._job))

    def _has_all(self, index: PackIndex) -> bool:
        """Whether every file is there, as far as its seal tells."""
        try:
            for name, seal in index.seals.items():
                seal.check(self._directory / name)
        except CheckpointError:
            return False
        return set(self._tensors) <= set(index.seals)

    def _require_same(self, found: PackJob, what: str) -> None:
        if difference := found.difference(self._job):
            raise CheckpointError(f"{self._directory}: {what} {difference}; give another folder, or remove this one")

    def _found(self, name: str) -> PackFile | None:
        """A file of an earlier run that seems to be what is wanted; None where there is none."""
        path = self._directory / name
        try:
            file = read_file(path) if path.is_file() else None
        except CheckpointError:
            return None
        wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in self._tensors[name]}
        held = {tensor: (stored.dtype, stored.shape) for tensor, stored in file.tensors.items()} if file else {}
        return file if held == wanted else None

    def _require_space(self) -> None:
        """Raises CheckpointError where the disk has too little for what is still to be written."""
        files = [tensors for name, tensors in self._tensors.items() if name not in self._seals]
        needed_nbytes = SPARE_NBYTES + sum(tensor.nbytes + tensor.padding_nbytes for tensors in files for tensor in tensors)
        place = self._directory if self._directory.is_dir() else self._directory.parent
        # A file that is there and will be replaced is not counted: the new one is written before it goes.
        free_nbytes = shutil.disk_usage(place).free
        if free_nbytes < needed_nbytes:
            raise CheckpointError(
                f"{self._directory}: the disk has {free_nbytes / GIB:.2f} GiB free, {needed_nbytes / GIB:.2f} GiB are needed; "
                "free some, or give a folder on another disk"
            )

    def _small_files(self) -> dict[str, bytes]:
        """What describes the model, and its tokenizer."""
        files = {"config.json": _json(self._config), "generation_config.json": _json(generation_json(self._checkpoint.spec))}
        tokenizer = self._checkpoint.tokenizer
        if tokenizer.gguf_metadata is not None:
            files[GGUF_TOKENIZER_NAME] = _json(tokenizer.gguf_metadata)
        if tokenizer.directory is not None:
            found = [tokenizer.directory / name for name in TOKENIZER_FILES]
            files |= {path.name: path.read_bytes() for path in found if path.is_file()}
        return files

    def _remove_marker(self) -> None:
        marker = self._directory / MARKER_NAME
        if marker.is_file():
            marker.unlink()
            sync_folder(self._directory)

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self._directory}: cannot be written: {error.strerror}; what is complete was kept, and the same command goes on"
        )


def _files(checkpoint: Checkpoint, job: PackJob) -> dict[str, list[OutTensor]]:
    """The files with tensors, in order."""
    layers = {
        layer_file_name(layer): [part_tensor(job, layer, "attention"), part_tensor(job, layer, "records")]
        for layer in range(checkpoint.spec.num_layers)
    }
    return {OUTSIDE_NAME: list(outside_tensors(checkpoint.spec, job).values())} | layers


def _locked(directory: Path) -> int:
    """The folder, opened, and held by this process until it is closed."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise CheckpointError(f"{directory}: is being packed by another process; wait for it, or stop it") from error
    except OSError:
        pass  # a file system without locks: what two processes write has names of its own, and one of them fails
    return descriptor


def _json(fields: Mapping[str, object]) -> bytes:
    return json.dumps(fields).encode() + b"\n"
