"""Writes any checkpoint as a Hugging Face folder: config.json, generation_config.json, .safetensors shards and their index.

The folder appears under its name only when it is complete and on the disk; whatever goes wrong before leaves nothing behind.
Knows no format but the one it writes.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from offload_sirius_loaders.arch import config_json, generation_json, model_spec, tensor_names
from offload_sirius_loaders.checkpoint import NUMPY_OF_ELEMENT, Checkpoint, Element, TensorInfo, read_rows
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.safetensors import INDEX_SUFFIX, TOKENIZER_FILES
from offload_sirius_loaders.shard import LENGTH_NBYTES
from offload_sirius_loaders.spec import ModelSpec

GIB = 2**30
PIECE_NBYTES = 16 * 2**20
"""Decoded bytes held at a time, about."""
SPARE_NBYTES = 2**20
"""Room for headers, index and JSON files."""

Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


@dataclass(frozen=True, kw_only=True)
class _Output:
    """One tensor as it is written."""

    name: str
    info: TensorInfo

    @property
    def nbytes(self) -> int:
        return math.prod(self.info.shape) * np.dtype(NUMPY_OF_ELEMENT[self.info.element]).itemsize


def write_checkpoint(
    checkpoint: Checkpoint, directory: Path, max_shard_nbytes: int = 2 * GIB, progress: Progress | None = None
) -> None:
    """Write all tensors, decoded to their element type, and what describes them. Tokenizer files are copied where there are any.

    max_shard_nbytes: a shard is closed before it grows beyond this; a larger tensor gets one of its own. Raises CheckpointError
    when the folder exists, the disk is too small, or config.json has no words for the model.
    """
    outputs = [_Output(name=name, info=checkpoint.tensors[key]) for key, name in tensor_names(checkpoint.spec).items()]
    config = checked_config(checkpoint.spec, cast(Element, checkpoint.tensors[None, "embedding"].element), directory)
    _check_target(directory, sum(output.nbytes for output in outputs))
    # Beside the target, so that the last step is a rename within one file system.
    partial = directory.parent / f".{directory.name}.partial-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
        _write_shards(checkpoint, _shards(outputs, max_shard_nbytes), partial, progress or _no_progress)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", generation_json(checkpoint.spec))
        _copy_tokenizer(checkpoint, partial)
        _sync(partial)
        partial.rename(directory)
        _sync(directory.parent)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written: {error.strerror}; nothing was left behind") from error
    finally:
        # Gone already where all went well; else this also runs on KeyboardInterrupt.
        shutil.rmtree(partial, ignore_errors=True)


def _no_progress(nbytes: int) -> None:
    pass


def checked_config(spec: ModelSpec, element: Element, directory: Path) -> dict[str, Any]:
    """config.json of a model whose tensors are stored as `element`, checked by reading it back.

    A model that it cannot describe must not be written as another one. directory: for messages. Raises CheckpointError.
    """
    config = config_json(spec, element)
    read_back = model_spec(config, generation_json(spec), name=spec.name)
    if replace(read_back, stored_dtype=spec.stored_dtype) != spec:
        raise CheckpointError(
            f"{directory}: cannot be written: {_difference(spec, read_back)} of {spec.name} cannot be said in the config.json "
            f"of a {spec.architecture} model; keep the checkpoint as it is"
        )
    return config


def _difference(spec: ModelSpec, other: ModelSpec) -> str:
    names = (name for name in vars(spec) if name != "stored_dtype")
    return next(f"{name} = {getattr(spec, name)}" for name in names if getattr(spec, name) != getattr(other, name))


def _check_target(directory: Path, nbytes: int) -> None:
    if os.path.lexists(directory):
        raise CheckpointError(f"{directory}: exists already; give a folder that does not, or remove it")
    if not directory.parent.is_dir():
        raise CheckpointError(f"{directory}: its parent folder does not exist; create it first")
    free_nbytes, needed_nbytes = shutil.disk_usage(directory.parent).free, nbytes + SPARE_NBYTES
    if free_nbytes < needed_nbytes:
        raise CheckpointError(
            f"{directory}: the disk has {free_nbytes / GIB:.2f} GiB free, {needed_nbytes / GIB:.2f} GiB are needed; "
            "free some or give a folder on another disk"
        )


def _shards(outputs: list[_Output], max_shard_nbytes: int) -> list[list[_Output]]:
    """Consecutive tensors up to the limit; at least one each."""
    shards: list[list[_Output]] = [[]]
    free_nbytes = max_shard_nbytes
    for output in outputs:
        if shards[-1] and output.nbytes > free_nbytes:
            shards.append([])
            free_nbytes = max_shard_nbytes
        shards[-1].append(output)
        free_nbytes -= output.nbytes
    return shards


def _write_shards(checkpoint: Checkpoint, shards: list[list[_Output]], directory: Path, progress: Progress) -> None:
    names = _shard_names(len(shards))
    for name, outputs in zip(names, shards, strict=True):
        _write_shard(checkpoint, outputs, directory / name, progress)
    if len(shards) > 1:
        _write_index(directory / ("model" + INDEX_SUFFIX), dict(zip(names, shards, strict=True)))


def _shard_names(num_shards: int) -> list[str]:
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]


def _write_index(path: Path, shards: Mapping[str, list[_Output]]) -> None:
    total_nbytes = sum(output.nbytes for outputs in shards.values() for output in outputs)
    shard_of_tensor = {output.name: name for name, outputs in shards.items() for output in outputs}
    _write_json(path, {"metadata": {"total_size": total_nbytes}, "weight_map": shard_of_tensor})


def _write_shard(checkpoint: Checkpoint, outputs: list[_Output], path: Path, progress: Progress) -> None:
    with path.open("xb") as file:
        file.write(_header(outputs))
        for output in outputs:
            for piece in _pieces(checkpoint, output.info):
                file.write(piece)
                progress(piece.nbytes)
        _flush(file)


def _header(outputs: list[_Output]) -> bytes:
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers 4 refuses the file
    cursor = 0
    for output in outputs:
        offsets = [cursor, cursor + output.nbytes]
        fields[output.name] = {"dtype": output.info.element, "shape": list(output.info.shape), "data_offsets": offsets}
        cursor += output.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8, as the format asks
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text


def _pieces(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[memoryview]:
    """The decoded bytes of a tensor, about PIECE_NBYTES at a time; all at once where the file has it transposed."""
    decoded_row_nbytes = math.prod(info.shape) // info.num_rows * np.dtype(NUMPY_OF_ELEMENT[info.element]).itemsize
    step = max(1, PIECE_NBYTES // decoded_row_nbytes // info.row_multiple) * info.row_multiple
    if info.transposed:
        step = info.num_rows
    for first_row in range(0, info.num_rows, step):
        num_rows = min(step, info.num_rows - first_row)
        values = checkpoint.decode(info, read_rows(info, first_row, num_rows), first_row, num_rows)
        yield np.ascontiguousarray(values.T if info.transposed else values).data.cast("B")


def _copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    source = checkpoint.tokenizer.directory
    for name in TOKENIZER_FILES if source else ():
        if source and (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
            _sync(directory / name)


def _write_json(path: Path, fields: Mapping[str, Any]) -> None:
    with path.open("xb") as file:
        file.write(json.dumps(fields, indent=2).encode() + b"\n")
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
