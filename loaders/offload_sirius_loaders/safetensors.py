"""A Hugging Face checkpoint: config.json and .safetensors files. Opening reads headers only; no weight is read or mapped.

Knows nothing of the hub, nor of what the tensors are for: that is arch.py's table. How quantised ones are stored is told by
quantisation.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.arch import model_spec, tensor_names, tensor_shapes
from offload_sirius_loaders.by_input import InputMatrix
from offload_sirius_loaders.by_output import OutputMatrix
from offload_sirius_loaders.checkpoint import NUMPY_OF_ELEMENT, Checkpoint, Element, Key, TensorInfo, TokenizerFiles
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.linear import Linear
from offload_sirius_loaders.quantisation import Scheme, read_schemes
from offload_sirius_loaders.shard import StoredTensor, read_shard
from offload_sirius_loaders.shown import short
from offload_sirius_loaders.spec import ModelSpec

INDEX_SUFFIX = ".safetensors.index.json"
LONGEST_NAME = 255
"""Characters that file systems take; names of tensors are not longer either."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
QUANTISED_WORDS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv")
"""Last words of names that layers have only where they are quantised."""
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


Matrix = InputMatrix | OutputMatrix
"""A quantised matrix: turns its stored bytes into numbers."""


class SafetensorsCheckpoint(Checkpoint):
    """Plain tensors are stored as they are used, so that `decode` only looks at the bytes as numbers; others are dequantised."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        path: Path,
        tokenizer: TokenizerFiles,
        tensors: Mapping[Key, TensorInfo],
        quantised: Mapping[str, Matrix],
    ) -> None:
        """quantised: name of a tensor -> how it is decoded; what is not in it is plain."""
        self.spec = spec
        self.path = path
        self.tokenizer = tokenizer
        self.tensors = tensors
        self._quantised = quantised

    def decode(self, info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """A view of raw, [num_rows, columns] or [elements] for a vector; float32 where the tensor is quantised."""
        if info.name in self._quantised:
            return self._quantised[info.name].decode(_parts(info, raw, first_row, num_rows), first_row, num_rows)
        shape = (num_rows, *info.shape[1:]) if len(info.shape) > 1 else info.shape
        return raw.view(NUMPY_OF_ELEMENT[info.element]).reshape(shape)


def _parts(info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> dict[str, npt.NDArray[np.uint8]]:
    """Last word of a name -> its bytes of those that were read for some rows."""
    words = [info.name.rpartition(".")[2], *(companion.name for companion in info.companions)]
    ends = np.cumsum([each.nbytes for each in info.ranges(first_row, num_rows)])
    return dict(zip(words, np.split(raw, ends[:-1]), strict=True))


def open_safetensors(path: Path, name: str) -> Checkpoint:
    """Open a folder, a .safetensors file or a .safetensors.index.json; config.json lies in the folder or beside the file.

    name: what the ModelSpec is called. Raises CheckpointError for whatever is absent, broken, truncated or of a kind that cannot
    be run, before any weight is read.
    """
    file = _weights_file(path) if path.is_dir() else path
    _refuse_other_files(file)
    config = _config(file.parent)
    spec, schemes = _model_spec(config, file.parent, name), read_schemes(config)
    stored = _read_indexed(file) if file.name.endswith(INDEX_SUFFIX) else read_shard(file)
    if spec.num_layers > len(stored):  # before anything is sized by it
        raise config.error(
            f"num_hidden_layers is {spec.num_layers}, and the files hold {len(stored)} tensors in all; "
            "download config.json and weights of the same model"
        )
    tensors, quantised = _tensors(spec, schemes, stored, file.parent)
    return SafetensorsCheckpoint(
        spec=replace(spec, stored_dtype=_most_common_dtype(tensors)),
        path=path,
        tokenizer=tokenizer_in(file.parent),
        tensors=tensors,
        quantised=quantised,
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


def _config(directory: Path) -> JsonObject:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: has no config.json, which says what the model is; download it into this folder")
    return JsonObject.read(path)


def _model_spec(config: JsonObject, directory: Path, name: str) -> ModelSpec:
    path = directory / "generation_config.json"
    generation = JsonObject.read(path).fields if path.is_file() else None
    return model_spec(config.fields, generation, name=name, source=config.source)


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
        if not plain or not (tensor + shard).isprintable() or max(len(tensor), len(shard)) > LONGEST_NAME:
            raise fields.error(f"puts tensor {short(tensor)} in {short(shard)}; a .safetensors file of the same folder is needed")
    return shards


def _tensors(
    spec: ModelSpec, schemes: tuple[Scheme, ...], stored: Mapping[str, StoredTensor], directory: Path
) -> tuple[dict[Key, TensorInfo], dict[str, Matrix]]:
    """Where each tensor is, and by name how the quantised ones are decoded."""
    tensors: dict[Key, TensorInfo] = {}
    quantised: dict[str, Matrix] = {}
    shapes, words = tensor_shapes(spec), _words(stored) if schemes else {}
    for key, name in tensor_names(spec).items():
        opened = _quantised_tensor(key, name, shapes[key], schemes, words, directory)
        if opened:
            tensors[key], quantised[opened[0].name] = opened
        else:
            tensors[key] = _tensor_info(name, shapes[key], stored, directory)
    return tensors, quantised


def _words(stored: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Name of a module -> last words of the names of its tensors -> tensor."""
    words: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in stored.items():
        module, _, word = name.rpartition(".")
        words.setdefault(module, {})[word] = tensor
    return words


def _quantised_tensor(
    key: Key,
    name: str,
    shape: tuple[int, ...],
    schemes: tuple[Scheme, ...],
    words: Mapping[str, Mapping[str, StoredTensor]],
    directory: Path,
) -> tuple[TensorInfo, Matrix] | None:
    """None for a plain tensor. Where config.json has several ways, the first one that the headers fit."""
    module, _, word = name.rpartition(".")
    if len(shape) != 2 or word != "weight" or module not in words:
        return None
    linear = Linear(directory=directory, name=module, num_out=shape[0], num_in=shape[1], tensors=words[module])
    fitting = [scheme for scheme in schemes if scheme.is_stored_so(linear)]
    for index, scheme in enumerate(fitting):
        try:
            info, matrix = scheme.open(linear)
        except CheckpointError:
            if index + 1 < len(fitting):
                continue
            raise
        if key[0] is None and (info.transposed or key[1] == "embedding"):
            raise linear.error(info.name.rpartition(".")[2], "is quantised; embedding and head must be plain")
        return info, matrix
    other = next((word for word in QUANTISED_WORDS if linear.has(word)), None)
    if other and schemes:
        raise linear.error(other, "belongs to a layer that is not stored as quantization_config in config.json says")
    return None


def _tensor_info(name: str, shape: tuple[int, ...], stored: Mapping[str, StoredTensor], directory: Path) -> TensorInfo:
    tensor = stored.get(name)
    if tensor is None:
        remedy = "download the checkpoint again"
        if name == "lm_head.weight":
            remedy += ", or set tie_word_embeddings in config.json if the model's head is its embedding table"
        elif name.removesuffix(".weight") + ".qweight" in stored:
            remedy = "its layer is quantised: quantization_config in config.json must say how, " + remedy
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


def tokenizer_in(directory: Path) -> TokenizerFiles:
    """The tokenizer of a folder; none where it has no file that makes one."""
    if any((directory / name).is_file() for name in TOKENIZER_FILES[:3]):
        return TokenizerFiles(directory=directory)
    return TokenizerFiles()
