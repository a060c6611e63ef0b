"""Random weights of a known shape, `synthetic:llama-3-70b` or `synthetic:tiny?layers=8&dtype=F32`, for timing and for tests.

Nothing is stored: any range of rows is computed when it is asked for, at the speed of a memory copy. A value depends on the name
of its tensor, its place and the seed only. Knows no file.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.arch import model_spec, tensor_names, tensor_shapes
from offload_sirius_loaders.checkpoint import NUMPY_OF_ELEMENT, Checkpoint, Decoded, Element, Key, TensorInfo, TokenizerFiles
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.spec import ModelSpec

PREFIX = "synthetic:"
POOL_SIZE = 2**22 - 3
"""Elements after which the values of a tensor come again: a prime, so that no two rows of a matrix are alike before that."""
STANDARD_DEVIATION = 0.02
"""Of all matrices and biases. A layer then adds a few units to the residual stream, which stays finite in bfloat16 and float16
through 80 layers."""
NUM_BYTE_IDS = 256
"""Token ids that stand for bytes: the smallest vocabulary."""


def _llama(layers: int, width: int, heads: int, kv_heads: int, ffn: int, vocab: int, **others: Any) -> dict[str, Any]:
    """The config.json of a llama; no token ends a text, because random weights would end it at random."""
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": None,
        **others,
    }


_LLAMA_3_2_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _llama(4, 64, 4, 2, 176, 512, max_position_embeddings=2048),
    "small": _llama(8, 256, 4, 2, 688, 1024, max_position_embeddings=2048),
    "tinyllama-1.1b": _llama(22, 2048, 32, 4, 5632, 32000, max_position_embeddings=2048),
    "llama-3.2-1b": _llama(
        16,
        2048,
        32,
        8,
        8192,
        128256,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=_LLAMA_3_2_ROPE,
        tie_word_embeddings=True,
    ),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000, max_position_embeddings=4096),
    "llama-3-8b": _llama(32, 4096, 32, 8, 14336, 128256, max_position_embeddings=8192, rope_theta=500000.0),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13824, 32000, max_position_embeddings=4096),
    "qwen2.5-32b": _llama(
        64,
        5120,
        40,
        8,
        27648,
        152064,
        max_position_embeddings=32768,
        rope_theta=1000000.0,
        model_type="qwen2",
        rms_norm_eps=1e-6,
    ),
    "llama-3-70b": _llama(80, 8192, 64, 8, 28672, 128256, max_position_embeddings=8192, rope_theta=500000.0),
}
"""Shape -> its config.json, with the published values."""

_FIELD_OF_PARAMETER = {
    "layers": "num_hidden_layers",
    "vocab": "vocab_size",
    "ffn": "intermediate_size",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "positions": "max_position_embeddings",
}
PARAMETERS = (*_FIELD_OF_PARAMETER, "dtype", "seed")
"""What may follow the question mark."""


class SyntheticCheckpoint(Checkpoint):
    """A checkpoint without files: norms are ones, all else is normally distributed."""

    def __init__(self, *, spec: ModelSpec, seed: int) -> None:
        element = cast(Element, spec.stored_dtype)
        self.spec = spec
        self.path = None
        self.tokenizer = TokenizerFiles(num_bytes_ids=spec.vocab_size)
        self.tensors = _tensors(spec, element)
        self._pool = _Pool(element)
        self._seed = seed

    def decode(self, info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """Compute rows; raw is empty and not looked at."""
        shape = (num_rows, *info.shape[1:]) if len(info.shape) > 1 else info.shape
        values = np.empty(shape, NUMPY_OF_ELEMENT[info.element])
        if info.name.endswith("norm.weight"):
            values[...] = _cast(np.ones(1, np.float32), info.element)
        else:
            self._pool.copy_to(values.reshape(-1), _phase(info.name, self._seed) + first_row * values.size // num_rows)
        return values


class _Pool:
    """Normally distributed numbers, made when they are first needed and repeated without end."""

    def __init__(self, element: Element) -> None:
        self._element = element
        self._lock = Lock()
        self._values: npt.NDArray[Any] | None = None

    def copy_to(self, values: npt.NDArray[Any], first: int) -> None:
        """Fill a vector with the numbers from `first` on."""
        pool, position = self._numbers(), first % POOL_SIZE
        while values.size:
            piece = pool[position : position + values.size]
            values[: piece.size] = piece
            values, position = values[piece.size :], 0

    def _numbers(self) -> npt.NDArray[Any]:
        with self._lock:
            if self._values is None:
                normal = np.random.default_rng(0).standard_normal(POOL_SIZE, np.float32)
                self._values = _cast(normal * np.float32(STANDARD_DEVIATION), self._element)
            return self._values


def open_synthetic(name: str) -> Checkpoint:
    """Open `synthetic:SHAPE?parameter=value&...`, which is also the name of its ModelSpec.

    Parameters are those of PARAMETERS: counts, `dtype` (BF16, F16 or F32; default BF16) and `seed` (default 0). Raises
    CheckpointError for an unknown shape or parameter, and for values that make no model.
    """
    shape, _, query = name.removeprefix(PREFIX).partition("?")
    if shape not in SHAPES:
        raise CheckpointError(f"{name}: shape {shape!r} is not known; known are {', '.join(SHAPES)}")
    parameters = _parameters(name, query)
    dtype = parameters.pop("dtype", "BF16")
    if dtype not in get_args(Element):
        raise CheckpointError(f"{name}: dtype is {dtype}; it must be one of {', '.join(get_args(Element))}")
    counts = JsonObject(name, {parameter: _whole(value) for parameter, value in parameters.items()})
    seed = counts.count("seed", 0, least=0)
    given = {field: counts.count(parameter) for parameter, field in _FIELD_OF_PARAMETER.items() if counts.has(parameter)}
    spec = model_spec(SHAPES[shape] | given, None, name=name, source=name)
    if spec.vocab_size < NUM_BYTE_IDS:
        raise CheckpointError(f"{name}: vocab is {spec.vocab_size}; it must be at least {NUM_BYTE_IDS}, an id for every byte")
    return SyntheticCheckpoint(spec=replace(spec, stored_dtype=dtype), seed=seed)


def _parameters(name: str, query: str) -> dict[str, str]:
    parameters: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        parameter, equals, value = part.partition("=")
        if parameter not in PARAMETERS or not equals:
            raise CheckpointError(f"{name}: parameter {part!r} is not known; write NAME=VALUE, known are {', '.join(PARAMETERS)}")
        if parameter in parameters:
            raise CheckpointError(f"{name}: parameter {parameter} stands twice; give it once")
        parameters[parameter] = value
    return parameters


def _whole(text: str) -> int | str:
    """The number, or the text as it is, for the message that refuses it."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else text


def _tensors(spec: ModelSpec, element: Element) -> dict[Key, TensorInfo]:
    shapes, item_nbytes = tensor_shapes(spec), np.dtype(NUMPY_OF_ELEMENT[element]).itemsize
    info = partial(TensorInfo, dtype=element, element=element, file=None, offset=0)
    return {
        key: info(name=name, shape=shapes[key], nbytes=math.prod(shapes[key]) * item_nbytes)
        for key, name in tensor_names(spec).items()
    }


def _phase(name: str, seed: int) -> int:
    """Where in the pool a tensor begins."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % POOL_SIZE


def _cast(values: npt.NDArray[np.float32], element: Decoded) -> npt.NDArray[Any]:
    """float32 to the element type; bfloat16 is rounded to nearest, ties to even, and carried in uint16."""
    if element != "BF16":
        return values.astype(NUMPY_OF_ELEMENT[element])
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
