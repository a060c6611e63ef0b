"""GGUF metadata -> ModelSpec, for the architectures `llama` (Mistral's models are written as it too) and `qwen2`.

Knows the names of the metadata fields and what they mean; knows neither the container nor the bytes of weights, except for the
one small tensor that holds the RoPE scaling of Llama 3.1 and later.
"""

from __future__ import annotations

from collections import Counter
from math import log, pi, prod
from typing import Any

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.gguf_header import GgufHeader
from offload_sirius_loaders.shown import short
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

ARCHITECTURES = ("llama", "qwen2")
ROPE_DIVISORS = "rope_freqs.weight"
"""Tensor [E / 2] by which the rotary frequencies are divided: how a GGUF file keeps the scaling of Llama 3.1 and later."""

# What llama3 scaling has been in every model published with it; only its factor differs, and that is read from the tensor.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192

_END_TOKEN_FIELDS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_spec(header: GgufHeader, name: str) -> ModelSpec:
    """The model that a header describes. Raises CheckpointError where a field is missing, wrong or asks for what is not built."""
    fields = _Fields(header)
    _refuse_what_is_not_built(fields)
    width, num_heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    num_layers, vocab_size = _num_layers(fields), _vocab_size(header)
    head_dim = _head_dim(fields, width, num_heads)
    num_kv_heads = fields.integer("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(f"{num_heads} heads cannot share {num_kv_heads} key-value heads")
    rope = _rope(fields, head_dim)
    return ModelSpec(
        name=name,
        architecture=fields.architecture,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_width=fields.integer("feed_forward_length"),
        vocab_size=vocab_size,
        max_positions=_max_positions(fields, rope),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        qkv_bias=fields.architecture == "qwen2" or "blk.0.attn_q.bias" in header.tensors,
        output_bias="blk.0.attn_output.bias" in header.tensors,
        tied_head="output.weight" not in header.tensors,
        # A sliding window is not part of these architectures in GGUF: llama.cpp runs them with full attention.
        layer_windows=(None,) * num_layers,
        stored_dtype=_stored_dtype(header),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        eos_token_ids=_end_token_ids(fields, vocab_size),
    )


class _Fields:
    """Metadata of one architecture, by type; each getter raises CheckpointError with the field's full name."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.architecture = str(header.metadata.get("general.architecture"))

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self._field(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"metadata field {self.architecture}.{key} is {_short(value)}, it must be a positive whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._field(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise self.error(f"metadata field {self.architecture}.{key} is {_short(value)}, it must be a positive number")
        return float(value)

    def text(self, key: str, default: str) -> str:
        return str(self._field(key, default))

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.header.metadata

    def token_id(self, key: str, vocab_size: int) -> int | None:
        """A special token of the tokenizer, None where the file names none."""
        value = self.header.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
            raise self.error(f"metadata field tokenizer.ggml.{key} is {_short(value)}, the vocabulary ends at {vocab_size - 1}")
        return value

    def error(self, found: str) -> CheckpointError:
        return CheckpointError(f"{self.header.path}: {found}; convert the model again, or download another file")

    def _field(self, key: str, default: Any) -> Any:
        value = self.header.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.error(f"metadata field {self.architecture}.{key} is missing")
        return value


def _short(value: object) -> str:
    """A value as an error message shows it: a list (one number a layer) can be long."""
    return f"a list of {len(value)}" if isinstance(value, list) else short(value)


def _refuse_what_is_not_built(fields: _Fields) -> None:
    header = fields.header
    if fields.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise CheckpointError(
            f"{header.path}: architecture {short(fields.architecture)} is not supported in GGUF files; use one of {known}"
        )
    num_files = header.metadata.get("split.count", 1)
    if num_files not in (0, 1):
        raise CheckpointError(
            f"{header.path}: one of {short(num_files)} files that a model was split into; "
            "merge them with: llama-gguf-split --merge FIRST_FILE MERGED_FILE"
        )
    if fields.has("expert_count") and header.metadata[f"{fields.architecture}.expert_count"] != 0:
        raise CheckpointError(f"{header.path}: a mixture of experts is not supported; use a dense model")


def _head_dim(fields: _Fields, width: int, num_heads: int) -> int:
    if not fields.has("attention.key_length") and width % num_heads:
        raise fields.error(f"width {width} is not a multiple of the {num_heads} heads")
    head_dim = fields.integer("attention.key_length", width // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{fields.header.path}: {key} is {fields.integer(key)} and the heads are {head_dim} wide; "
                "only models where both are equal are supported"
            )
    if head_dim % 2:
        raise fields.error(f"heads are {head_dim} wide, rotary position embedding needs an even number")
    return head_dim


def _num_layers(fields: _Fields) -> int:
    """Bounded by what the file holds before anything is sized by it."""
    num_layers, num_tensors = fields.integer("block_count"), len(fields.header.tensors)
    if num_layers > num_tensors:
        raise fields.error(f"{num_layers:,} layers cannot be in a file of {num_tensors:,} tensors")
    return num_layers


def _vocab_size(header: GgufHeader) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{header.path}: no matrix token_embd.weight is in the file; download the file again")
    return embedding.shape[0]


def _stored_dtype(header: GgufHeader) -> str:
    """The type that holds most numbers; vectors (norms, always F32) do not count."""
    num_elements: Counter[str] = Counter()
    for tensor in header.tensors.values():
        if len(tensor.shape) > 1:
            num_elements[tensor.dtype] += prod(tensor.shape)
    return max(num_elements, key=num_elements.__getitem__)


def _end_token_ids(fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    named = [fields.token_id(key, vocab_size) for key in _END_TOKEN_FIELDS]
    return tuple(dict.fromkeys(token_id for token_id in named if token_id is not None))


def _max_positions(fields: _Fields, rope: RopeSpec) -> int:
    """Converters write the trained length of a YaRN model or the scaled one, as its config.json happened to have it."""
    stated = fields.integer("context_length")
    if rope.kind != "yarn":
        return stated
    return max(stated, int(rope.parameters["factor"] * rope.parameters["original_max_position_embeddings"]))


def _rope(fields: _Fields, head_dim: int) -> RopeSpec:
    unnamed = "linear" if fields.has("rope.scaling.factor") else "none"
    kind, theta = fields.text("rope.scaling.type", unnamed), fields.number("rope.freq_base", 10000.0)
    divisors = _rope_divisors(fields.header, head_dim)
    if divisors is not None:
        if kind != "none":
            raise fields.error(f"RoPE scaling is given twice, as {short(kind)} and by tensor {ROPE_DIVISORS}")
        return _llama3_rope(fields, theta, divisors)
    if kind == "none":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(kind="linear", theta=theta, parameters={"factor": fields.number("rope.scaling.factor")})
    if kind == "yarn":
        return RopeSpec(kind="yarn", theta=theta, parameters=_yarn_parameters(fields))
    raise CheckpointError(
        f"{fields.header.path}: RoPE scaling {short(kind)} is not supported in GGUF files; none, linear and yarn are"
    )


def _yarn_parameters(fields: _Fields) -> dict[str, float | bool]:
    factor = fields.number("rope.scaling.factor")
    parameters: dict[str, float | bool] = {
        "factor": factor,
        "original_max_position_embeddings": fields.integer("rope.scaling.original_context_length"),
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if fields.has("rope.scaling.attn_factor"):
        # llama.cpp multiplies YaRN's own factor by this one; the entry of config.json replaces it.
        parameters["attention_factor"] = fields.number("rope.scaling.attn_factor") * (0.1 * log(factor) + 1 if factor > 1 else 1)
    return parameters


def _rope_divisors(header: GgufHeader, head_dim: int) -> npt.NDArray[np.float32] | None:
    tensor = header.tensors.get(ROPE_DIVISORS)
    if tensor is None:
        return None
    if tensor.dtype != "F32" or tensor.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{header.path}: tensor {ROPE_DIVISORS} is {tensor.dtype} {list(tensor.shape)}, F32 [{head_dim // 2}] is needed; "
            "convert the model again"
        )
    with header.path.open("rb") as file:
        file.seek(tensor.offset)
        return np.frombuffer(file.read(tensor.nbytes), "<f4")


def _llama3_rope(fields: _Fields, theta: float, divisors: npt.NDArray[np.float32]) -> RopeSpec:
    """The longest waves are divided by the whole factor, so that the largest divisor is the factor; the rest must follow."""
    if np.all(divisors == 1):
        return RopeSpec(theta=theta)
    factor = float(divisors.max())
    if not np.allclose(divisors, llama3_divisors(theta, 2 * len(divisors), factor), rtol=1e-3):
        raise CheckpointError(
            f"{fields.header.path}: tensor {ROPE_DIVISORS} is not the llama3 RoPE scaling of any factor; "
            "use the model's safetensors files instead"
        )
    parameters = {
        "factor": factor,
        "low_freq_factor": _LOW_FREQ_FACTOR,
        "high_freq_factor": _HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": _ORIGINAL_POSITIONS,
    }
    return RopeSpec(kind="llama3", theta=theta, parameters=parameters)


def llama3_divisors(theta: float, head_dim: int, factor: float) -> npt.NDArray[np.float64]:
    """What llama3 scaling divides each of the head_dim / 2 rotary frequencies by.

    A wave that turns at least high_freq_factor times within the original length is left alone, one that turns less than
    low_freq_factor times is stretched by the whole factor, and between the two the frequency is interpolated.
    """
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = _ORIGINAL_POSITIONS * frequencies / (2 * pi)
    kept = np.clip((turns - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / (kept + (1 - kept) / factor)
    return divisors
