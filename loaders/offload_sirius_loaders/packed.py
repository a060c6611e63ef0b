"""A packed model: layers stored as they are held in memory. Opening reads headers and small files, checked by their seals.

Knows what the bytes of a layer are called and how many there are, not what they mean.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.arch import model_spec, tensor_names
from offload_sirius_loaders.checkpoint import (
    NUMPY_OF_ELEMENT,
    PACKED_ROW_NBYTES,
    Checkpoint,
    Element,
    Key,
    LayerPart,
    PackedLayers,
    TensorInfo,
    TokenizerFiles,
)
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.pack_file import OutTensor, PackFile, read_file
from offload_sirius_loaders.pack_index import (
    GGUF_TOKENIZER_NAME,
    INDEX_NAME,
    OUTSIDE_NAME,
    PackIndex,
    PackJob,
    layer_file_name,
    read_index,
)
from offload_sirius_loaders.safetensors import tokenizer_in
from offload_sirius_loaders.shard import StoredTensor
from offload_sirius_loaders.shown import short
from offload_sirius_loaders.spec import ModelSpec, Role

ELEMENT_OF_DTYPE: dict[str, Element] = {"bfloat16": "BF16", "float32": "F32"}

ROLES = get_args(Role)
QUANTIZED_HEAD_NAME = "quantized_head"

ERRORS_NOTE = "errors"
"""Note in a layer's file: what quantising has done to its matrices."""


class PackedCheckpoint(Checkpoint):
    """Everything is stored as it is used, so that `decode` only looks at the bytes."""

    packed: PackedLayers

    def __init__(self, directory: Path, spec: ModelSpec, index: PackIndex, files: dict[str, PackFile]) -> None:
        """files: those with tensors, by name."""
        self.spec = spec
        self.path = directory
        self.index = index
        self.files = files
        self.tokenizer = _tokenizer(directory, index)
        self.tensors = _outside_tensors(spec, index.job, files)
        self.packed = _packed_layers(spec, index.job, files)

    def decode(self, info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """See Checkpoint.decode. A view of raw."""
        shape = (num_rows, *info.shape[1:]) if len(info.shape) > 1 else info.shape
        return raw.view(NUMPY_OF_ELEMENT[info.element]).reshape(shape)

    def errors(self, layer: int) -> dict[str, dict[str, float]]:
        """Role of a matrix -> what quantising it has done: `largest` and `relative_rms`. Empty where nothing is quantised."""
        file = self.files[layer_file_name(layer)]
        notes = JsonObject.parse(file.notes.get(ERRORS_NOTE, "{}").encode(errors="replace"), f"{file.path}: errors")
        for role, error in notes.fields.items():
            if role not in ROLES or not isinstance(error, dict) or set(error) != {"largest", "relative_rms"}:
                raise notes.error(f"{short(role)} is {short(error)}; a matrix with its errors is needed, pack the model again")
            found = JsonObject(f"{notes.source} of {role}", error)
            for name in error:
                found.number(name, above=-1.0)
        return dict(notes.fields)


def open_packed(directory: Path, name: str) -> PackedCheckpoint:
    """Open a folder that `offload-sirius pack` has written; name is what the ModelSpec is called.

    Every file is looked for, and its size and header compared with their seals; small files are compared as a whole. Raises
    CheckpointError, also for a folder that was not finished.
    """
    index = read_index(directory)
    for file_name, seal in index.seals.items():
        seal.check(directory / file_name)
    spec = replace(_spec(directory, name), stored_dtype=ELEMENT_OF_DTYPE[index.job.dtype])
    for file_name in pack_file_names(spec):
        if file_name not in index.seals:
            raise CheckpointError(f"{directory / INDEX_NAME}: names no {file_name}; pack the model again")
    files = {file_name: read_file(directory / file_name) for file_name in pack_file_names(spec)}
    return PackedCheckpoint(directory, spec, index, files)


def pack_file_names(spec: ModelSpec) -> list[str]:
    """The files with a model's tensors, in the order in which they are written."""
    return [OUTSIDE_NAME, *(layer_file_name(layer) for layer in range(spec.num_layers))]


def outside_tensors(spec: ModelSpec, job: PackJob) -> dict[Key, OutTensor]:
    """What no layer has, as it is written."""
    names, element = tensor_names(spec), ELEMENT_OF_DTYPE[job.dtype]
    tensors: dict[Key, OutTensor] = {
        (None, role): OutTensor(name=names[None, role], dtype=element, shape=shape) for role, shape in spec.model_roles().items()
    }
    for role in spec.model_roles():
        if role in job.outside_blocks:
            shape = (spec.vocab_size, job.outside_blocks[role][1])
            tensors[None, role] = OutTensor(name=names[None, role], dtype="U8", shape=shape)
    if job.quantize_head != "none":
        tensors.pop((None, "head"), None)
        tensors[None, "head"] = OutTensor(name=QUANTIZED_HEAD_NAME, dtype="U8", shape=(spec.vocab_size, job.head_row_nbytes))
    return tensors


def part_tensor(job: PackJob, layer: int, part: LayerPart) -> OutTensor:
    """A part of a layer, as it is written."""
    attention_nbytes, records_nbytes = job.part_nbytes(layer)
    nbytes = attention_nbytes if part == "attention" else records_nbytes
    return OutTensor(name=part, dtype="U8", shape=(nbytes // PACKED_ROW_NBYTES, PACKED_ROW_NBYTES))


def _spec(directory: Path, name: str) -> ModelSpec:
    config = JsonObject.read(directory / "config.json")
    generation = JsonObject.read(directory / "generation_config.json")
    return model_spec(config.fields, generation.fields, name=name, source=config.source)


def _tokenizer(directory: Path, index: PackIndex) -> TokenizerFiles:
    if index.num_byte_ids is not None:
        return TokenizerFiles(num_bytes_ids=index.num_byte_ids)
    if (directory / GGUF_TOKENIZER_NAME).is_file():
        return TokenizerFiles(gguf_metadata=JsonObject.read(directory / GGUF_TOKENIZER_NAME).fields)
    return tokenizer_in(directory)


def _outside_tensors(spec: ModelSpec, job: PackJob, files: dict[str, PackFile]) -> dict[Key, TensorInfo]:
    infos: dict[Key, TensorInfo] = {}
    for key, tensor in outside_tensors(spec, job).items():
        stored = _stored(files[OUTSIDE_NAME], tensor)
        kind, _ = job.outside_blocks.get(key[1], (tensor.dtype, 0))
        infos[key] = TensorInfo(
            name=tensor.name,
            dtype=kind,
            element="U8" if tensor.dtype == "U8" else ELEMENT_OF_DTYPE[job.dtype],
            shape=tensor.shape,
            file=stored.file,
            offset=stored.offset,
            nbytes=stored.nbytes,
        )
    return infos


def _packed_layers(spec: ModelSpec, job: PackJob, files: dict[str, PackFile]) -> PackedLayers:
    for what, each in (("blocks", job.blocks), ("sizes", job.sizes)):
        if len(each) not in (0, spec.num_layers):
            raise CheckpointError(f"{files[OUTSIDE_NAME].path.parent / INDEX_NAME}: {what} is of another model; pack it again")
    parts: dict[tuple[int, LayerPart], TensorInfo] = {}
    for layer in range(spec.num_layers):
        for part in get_args(LayerPart):
            tensor = part_tensor(job, layer, part)
            stored = _stored(files[layer_file_name(layer)], tensor)
            parts[layer, part] = TensorInfo(
                name=f"{part} of layer {layer}",
                dtype="U8",
                element="U8",
                shape=tensor.shape,
                file=stored.file,
                offset=stored.offset,
                nbytes=stored.nbytes,
            )
    return PackedLayers(
        dtype=job.dtype,
        quantize=job.quantize,
        quantize_group=job.quantize_group,
        fields=job.fields,
        blocks=job.blocks,
        parts=parts,
        quantize_head=job.quantize_head,
    )


def _stored(file: PackFile, tensor: OutTensor) -> StoredTensor:
    stored = file.tensors.get(tensor.name)
    if stored is None or (stored.dtype, stored.shape) != (tensor.dtype, tensor.shape):
        raise CheckpointError(
            f"{file.path}: does not hold {tensor.name} as {tensor.dtype} {list(tensor.shape)}; pack the model again"
        )
    return stored
