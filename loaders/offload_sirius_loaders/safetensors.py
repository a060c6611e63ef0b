"""A Hugging Face checkpoint: config.json and .safetensors files. Opening reads headers only; no weight is read or mapped.

Knows nothing of the hub, nor of what the tensors are for: that is arch.py's table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.arch import model_spec, tensor_names, tensor_shapes
from offload_sirius_loaders.checkpoint import NUMPY_OF_ELEMENT, Checkpoint, Element, Key, TensorInfo, TokenizerFiles
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.shard import StoredTensor, read_shard
from offload_sirius_loaders.spec import ModelSpec

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Names that belong to a tokenizer; one of the first three is what makes one."""


class SafetensorsCheckpoint(Checkpoint):
    """Tensors stored as they are used: `decode` only looks at the bytes as numbers."""

    def __init__(self, *, spec: ModelSpec, path: Path, tokenizer: TokenizerFiles, tensors: Mapping[Key, TensorInfo]) -> None:
        self.spec = spec
        self.path = path
        self.tokenizer = tokenizer
        self.tensors = tensors

    def decode(self, info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """A view of raw: [num_rows, columns], or [elements] for a vector."""
        shape = (num_rows, *info.shape[1:]) if len(info.shape) > 1 else info.shape
        return raw.view(NUMPY_OF_ELEMENT[info.element]).reshape(shape)


def open_safetensors(path: Path, name: str) -> Checkpoint:
    """Open a folder, a .safetensors file or a .safetensors.index.json; config.json lies in the folder or beside the file.

    name: what the ModelSpec is called. Raises CheckpointError for whatever is absent, broken, truncated or of a kind that cannot
    be run, before any weight is read.
    """
    file = _weights_file(path) if path.is_dir() else path
    _refuse_other_files(file)
    spec = _model_spec(file.parent, name)
    stored = _read_indexed(file) if file.name.endswith(INDEX_SUFFIX) else read_shard(file)
    tensors = _tensors(spec, stored, file.parent)
    return SafetensorsCheckpoint(
        spec=replace(spec, stored_dtype=_most_common_dtype(tensors)),
        path=path,
        tokenizer=_tokenizer(file.parent),
        tensors=tensors,
    )


def _refuse_other_files(file: Path) -> None:
    if file.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(
            f"{file}: pickled weights are refused, because a pickle can run code when it is loaded; "
            "use a revision of the repository with safetensors, or convert the file with the safetensors library"
        )
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file or directory; give the path of a folder or a .safetensors file")
    if not file.name.endswith((".safetensors", INDEX_SUFFIX)):
        raise CheckpointError(f"{file}: is not a .safetensors file; give the path of a folder or a .safetensors file")


def _model_spec(directory: Path, name: str) -> ModelSpec:
    config_path, generation_path = directory / "config.json", directory / "generation_config.json"
    if not config_path.is_file():
        raise CheckpointError(f"{directory}: has no config.json, which says what the model is; download it into this folder")
    generation = JsonObject.read(generation_path).fields if generation_path.is_file() else None
    return model_spec(JsonObject.read(config_path).fields, generation, name=name, source=str(config_path))


def _weights_file(directory: Path) -> Path:
    """The one file of a folder that leads to all weights, or pickled ones where there is nothing better."""
    for name in ("model.safetensors", "model" + INDEX_SUFFIX):
        if (directory / name).is_file():
            return directory / name
    found = sorted(directory.glob("*.safetensors"))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: has {len(found)} .safetensors files and no model{INDEX_SUFFIX}, which says what is where; "
            "download the index"
        )
    found += [file for file in sorted(directory.glob("*")) if file.suffix in PICKLE_SUFFIXES]
    if found:
        return found[0]
    raise CheckpointError(f"{directory}: has no .safetensors file; download the weights into this folder, or give another")


def _read_indexed(index: Path) -> dict[str, StoredTensor]:
    """Name -> tensor over all shards of an index, which must agree with their headers."""
    shard_of_tensor = _weight_map(index)
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of_tensor.values())):
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{index}: names {shard}, which is not in the folder; download that shard")
        for name, tensor in read_shard(path).items():
            if name in stored:
                raise CheckpointError(
                    f"{path}: tensor {name} is also in {stored[name].file.name}; which one counts is not clear, "
                    "download both again"
                )
            stored[name] = tensor
    for name, shard in shard_of_tensor.items():
        if name not in stored or stored[name].file.name != shard:
            raise CheckpointError(
                f"{index}: says that tensor {name} is in {shard}, which does not hold it; download index and shard again"
            )
    return stored


def _weight_map(index: Path) -> dict[str, str]:
    fields = JsonObject.read(index)
    shards = fields.fields.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise fields.error("has no weight_map, which says which tensor is in which file; download the index again")
    for tensor, shard in shards.items():
        # A shard must be a plain name: an index from elsewhere has no business with files outside its folder.
        plain = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")
        if not plain or not (tensor + shard).isprintable():
            raise fields.error(f"puts tensor {short(tensor)} in {short(shard)}; a .safetensors file of the same folder is needed")
    return shards


def _tensors(spec: ModelSpec, stored: Mapping[str, StoredTensor], directory: Path) -> dict[Key, TensorInfo]:
    shapes = tensor_shapes(spec)
    return {key: _tensor_info(name, shapes[key], stored, directory) for key, name in tensor_names(spec).items()}


def _tensor_info(name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor], directory: Path) -> TensorInfo:
    tensor = stored.get(name)
    if tensor is None:
        remedy = "download the checkpoint again"
        if name == "lm_head.weight":
            remedy += ", or set tie_word_embeddings in config.json if the model's head is its embedding table"
        raise CheckpointError(f"{directory}: tensor {name} is missing, which config.json asks for; {remedy}")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}; "
            "download config.json and weights of the same model"
        )
    if tensor.dtype not in get_args(Element):
        raise CheckpointError(
            f"{tensor.file}: tensor {name} is stored as {tensor.dtype}; {', '.join(get_args(Element))} are supported, "
            "use a 16-bit revision of the model"
        )
    return TensorInfo(
        name=name,
        dtype=tensor.dtype,
        element=cast(Element, tensor.dtype),
        shape=shape,
        file=tensor.file,
        offset=tensor.offset,
        nbytes=tensor.nbytes,
    )


def _most_common_dtype(tensors: Mapping[Key, TensorInfo]) -> str:
    """Of the matrices: norms and biases are often kept wider."""
    return Counter(info.dtype for info in tensors.values() if len(info.shape) > 1).most_common(1)[0][0]


def _tokenizer(directory: Path) -> TokenizerFiles:
    if any((directory / name).is_file() for name in TOKENIZER_FILES[:3]):
        return TokenizerFiles(directory=directory)
    return TokenizerFiles()
