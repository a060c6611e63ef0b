"""A GGUF file as a Checkpoint: names of its tensors, and its block formats into numbers.

Knows the tensor names and the row order that llama.cpp's converter writes; the container is read by gguf_header, the metadata
by gguf_spec. Nothing of the file stays open or mapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from offload_sirius_loaders.checkpoint import BLOCK_TYPES, Checkpoint, Decoded, Element, Key, TensorInfo, TokenizerFiles
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.gguf_header import GgufHeader, StoredTensor, read_header
from offload_sirius_loaders.gguf_spec import ROPE_DIVISORS, read_spec
from offload_sirius_loaders.spec import ModelSpec, Role

_PLAIN_TYPES: dict[str, Element] = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_LITTLE_ENDIAN: dict[Decoded, str] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

OUTPUTS_TOGETHER = 32
"""Rows of a down projection in blocks that are regrouped together."""

_MODEL_TENSORS: dict[Role, str] = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
}
_LAYER_TENSORS: dict[Role, str] = {
    "input_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "post_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
}
_INTERLEAVED_ROLES: frozenset[Role] = frozenset(("q", "k", "q_bias", "k_bias"))
"""Roles whose rows a `llama` file keeps in another order, see _halves_from_pairs. A `qwen2` file does not."""


def open_gguf(path: Path, name: str) -> Checkpoint:
    """Open a GGUF file; name is what the model is called. Reads the header only. Raises CheckpointError."""
    header = read_header(path)
    return GgufCheckpoint(header, read_spec(header, name))


class GgufCheckpoint(Checkpoint):
    """The tensors of one GGUF file. Decoding is stateless, so that any number of threads may do it."""

    def __init__(self, header: GgufHeader, spec: ModelSpec, *, in_blocks: bool = False) -> None:
        """in_blocks: see `Checkpoint.in_blocks`."""
        self.spec = spec
        self._header = header
        self.path = header.path
        self.tokenizer = _tokenizer_files(header.metadata)
        infos = _tensor_infos(header, spec)
        self.tensors = {key: _as_blocks(key[1], info) for key, info in infos.items()} if in_blocks else infos
        self._interleaved = {info.name for (_, role), info in self.tensors.items() if _is_interleaved(spec, role)}

    def in_blocks(self) -> Checkpoint:
        """See Checkpoint.in_blocks."""
        return GgufCheckpoint(self._header, self.spec, in_blocks=True)

    def decode(self, info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """See Checkpoint.decode. Block types become float32, plain types are views unless their rows are reordered."""
        numbers = _numbers(info, raw.reshape(num_rows, info.row_nbytes))
        if len(info.shape) == 1:
            numbers = numbers.reshape(info.shape)
        return _halves_from_pairs(numbers, self.spec.head_dim) if info.name in self._interleaved else numbers


def _numbers(info: TensorInfo, rows: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """uint8 [rows, row_nbytes] -> [rows, columns]"""
    if info.element == "U8":
        return rows
    if info.dtype in _PLAIN_TYPES:
        return rows.view(_LITTLE_ENDIAN[info.element])
    numbers: npt.NDArray[Any] = dequantize(rows, GGMLQuantizationType[info.dtype])
    return numbers


def _as_blocks(role: Role, info: TensorInfo) -> TensorInfo:
    """A matrix whose rows are blocks as rows of bytes; others as they are.

    Of the down projection, which is regrouped by neuron, whole groups of outputs are read together, and there must be such.
    """
    has_parts = role == "down" and info.num_rows % OUTPUTS_TOGETHER
    if info.dtype not in BLOCK_TYPES or len(info.shape) == 1 or has_parts:
        return info
    row_multiple = OUTPUTS_TOGETHER if role == "down" else info.row_multiple
    return replace(info, element="U8", shape=(info.num_rows, info.row_nbytes), row_multiple=row_multiple)


def _halves_from_pairs(rows: npt.NDArray[Any], head_dim: int) -> npt.NDArray[Any]:
    """Undo the row order of a llama file. rows: [heads * E, columns] or [heads * E], whole heads.

    llama.cpp rotates rows 2i and 2i + 1 of a head together, this program rows i and i + E/2, as Hugging Face does. Its converter
    therefore moves row i to 2i and row i + E/2 to 2i + 1.
    """
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _is_interleaved(spec: ModelSpec, role: Role) -> bool:
    return spec.architecture == "llama" and role in _INTERLEAVED_ROLES


def _tokenizer_files(metadata: Mapping[str, Any]) -> TokenizerFiles:
    fields = {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
    return TokenizerFiles(gguf_metadata=fields) if "tokenizer.ggml.tokens" in fields else TokenizerFiles()


def _tensor_infos(header: GgufHeader, spec: ModelSpec) -> dict[Key, TensorInfo]:
    infos: dict[Key, TensorInfo] = {}
    for role, shape in spec.model_roles().items():
        infos[None, role] = _tensor_info(header, spec, role, _MODEL_TENSORS[role], shape)
    for layer in range(spec.num_layers):
        for role, shape in spec.layer_roles().items():
            infos[layer, role] = _tensor_info(header, spec, role, f"blk.{layer}.{_LAYER_TENSORS[role]}", shape)
    _refuse_unknown_tensors(header, {info.name for info in infos.values()} | {ROPE_DIVISORS})
    return infos


def _tensor_info(header: GgufHeader, spec: ModelSpec, role: Role, name: str, shape: tuple[int, ...]) -> TensorInfo:
    stored = header.tensors.get(name)
    if stored is None:
        raise CheckpointError(f"{header.path}: tensor {name} is missing; download the file again")
    if stored.shape != shape:
        raise CheckpointError(
            f"{header.path}: tensor {name} has shape {list(stored.shape)}, the metadata needs {list(shape)}; "
            "download the file again"
        )
    return TensorInfo(
        name=name,
        dtype=stored.dtype,
        element=_element(header.path, stored),
        shape=shape,
        file=header.path,
        offset=stored.offset,
        nbytes=stored.nbytes,
        row_multiple=spec.head_dim if _is_interleaved(spec, role) and len(shape) > 1 else 1,
    )


def _element(path: Path, stored: StoredTensor) -> Element:
    if stored.dtype in _PLAIN_TYPES:
        return _PLAIN_TYPES[stored.dtype]
    if stored.dtype in BLOCK_TYPES:
        return "F32"
    raise CheckpointError(
        f"{path}: tensor {stored.name} has type {stored.dtype}; use a file with {', '.join((*_PLAIN_TYPES, *BLOCK_TYPES))}"
    )


def _refuse_unknown_tensors(header: GgufHeader, known: set[str]) -> None:
    """A tensor that nobody asks for is a part of the model that would be left out, and only the text would show it."""
    for name in header.tensors:
        if name not in known:
            architecture = header.metadata["general.architecture"]
            raise CheckpointError(f"{header.path}: tensor {name} is not part of a plain {architecture} model; use another model")
