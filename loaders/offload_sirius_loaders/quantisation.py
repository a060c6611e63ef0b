"""The quantization_config of a config.json: by which method a checkpoint's linear layers are quantised, and with what settings.

Which layers are, the files say themselves: a layer whose weight is a plain tensor is taken as it is, so lists of modules that
were left out are not read. Activations are never quantised here; only methods are read whose weights alone define the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from offload_sirius_loaders.by_input import ByInput
from offload_sirius_loaders.by_output import ByOutput, Cells
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.shown import short

Scheme = ByInput | ByOutput
"""One way in which layers of a checkpoint are quantised."""

_FIELDS = ("quantization_config", "compression_config")
"""Where a config.json has it; the second is what early versions of compressed-tensors wrote."""
_FORMS: dict[str, Literal["packed", "int", "float"]] = {
    "pack-quantized": "packed",
    "int-quantized": "int",
    "naive-quantized": "int",
    "float-quantized": "float",
}
"""Formats of compressed-tensors; naive-quantized holds floats, too."""
_MIXED = "mixed-precision"
"""Each group of layers has a format of its own."""


def read_schemes(fields: JsonObject) -> tuple[Scheme, ...]:
    """The ways of quantising that a config.json names; none where the model is not quantised. Raises CheckpointError."""
    name = next((name for name in _FIELDS if fields.has(name)), None)
    if name is None:
        return ()
    value = fields.fields[name]
    found = JsonObject(f"{fields.source}: {name}", value if isinstance(value, Mapping) else {})
    method = found.fields.get("quant_method", "compressed-tensors" if name == "compression_config" else None)
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise fields.error(
            f"the checkpoint is quantised by {short(method if isinstance(value, Mapping) else value)}, which is not supported; "
            f"supported are {', '.join(_READERS)}, use one of these, 16-bit safetensors or a GGUF file"
        )
    return reader(found)


def _awq(fields: JsonObject) -> tuple[Scheme, ...]:
    if fields.fields.get("backend") == "llm-awq":
        raise fields.error("backend is llm-awq; that order of the weights is not supported, use a revision made by AutoAWQ")
    _choice(fields, "version" if fields.has("version") else "format", ("gemm",), "gemm")
    bits = _bits(fields, "bits" if fields.has("bits") else "w_bit", (4,))
    group_size = _group_size(fields, "group_size" if fields.has("group_size") else "q_group_size")
    return (ByInput(method="AWQ", bits=bits, group_size=group_size, zeros_needed=_flag(fields, "zero_point", True)),)


def _gptq(fields: JsonObject) -> tuple[Scheme, ...]:
    # transformers calls format what the quantisers call checkpoint_format.
    name = "checkpoint_format" if fields.has("checkpoint_format") else "format"
    version = _choice(fields, name, ("gptq", "gptq_v2"), "gptq")
    _choice(fields, "pack_dtype", ("int32",), "int32")
    if fields.flag("is_marlin_format"):
        raise fields.error("is_marlin_format is true; that order of the weights is not supported, use a revision without it")
    dynamic = fields.fields.get("dynamic") or {}
    # What it only leaves out is seen in the files.
    if not isinstance(dynamic, Mapping) or not all(pattern.startswith("-:") for pattern in dynamic):
        raise fields.error(f"dynamic is {short(dynamic)}; settings that are the same for all layers are needed")
    return (
        ByInput(
            method="GPTQ",
            bits=_bits(fields, "bits", (4, 8)),
            group_size=_group_size(fields, "group_size"),
            any_order=fields.flag("desc_act"),
            zero_offset=1 if version == "gptq" else 0,
        ),
    )


def _fp8(fields: JsonObject) -> tuple[Scheme, ...]:
    """Blocks where there is a weight_block_size, else a scale for each tensor or row."""
    _choice(fields, "fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    if not fields.has("weight_block_size"):
        cells: tuple[Cells, ...] = ("tensor", "channel")
        return tuple(ByOutput(form="float", bits=8, cells=each) for each in cells)
    cell = _block(fields, "weight_block_size")
    return (ByOutput(form="float", bits=8, cells="block", cell=cell, scale_word="weight_scale_inv"),)


def _compressed_tensors(fields: JsonObject) -> tuple[Scheme, ...]:
    groups = fields.fields.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.error(f"config_groups is {short(groups)}; an object with a description of each group of layers is needed")
    for name in ("sparsity_config", "transform_config"):
        value = fields.fields.get(name) or {}
        if not isinstance(value, Mapping) or value.get("format", "dense") != "dense" or value.get("config_groups"):
            raise fields.error(f"{name} is {short(value)}; weights that alone define the model are needed, use another revision")
    described = (_described(fields, name, group) for name, group in groups.items())
    return tuple(scheme for scheme in described if scheme)


def _described(fields: JsonObject, name: str, value: Any) -> Scheme | None:
    """The weights of one group of layers; None where only their activations are quantised."""
    if not isinstance(value, Mapping):
        raise fields.error(f"{short(name)} of config_groups is {short(value)}; an object is needed")
    group = JsonObject(f"{fields.source}: {short(name)}", value)
    weights = value.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, Mapping):
        raise group.error(f"weights is {short(weights)}; an object that says how they are quantised is needed")
    described = JsonObject(f"{group.source}: weights", weights)
    form = _form(fields, group, described)
    cells = _choice(described, "strategy", get_args(Cells), "group" if described.has("group_size") else "tensor")
    symmetric = _flag(described, "symmetric", True)
    if form == "float" and not symmetric:
        raise described.error("symmetric is false; floats with zero points are not supported, use another revision")
    cell = (1, 1)
    if cells == "group":
        cell = (1, described.count("group_size"))
    elif cells == "block":
        cell = _block(described, "block_structure")
    return ByOutput(
        form=form,
        bits=_bits(described, "num_bits", (4, 8) if form == "packed" else (8,)),
        cells=cells,
        cell=cell,
        symmetric=symmetric,
    )


def _form(fields: JsonObject, group: JsonObject, weights: JsonObject) -> Literal["packed", "int", "float"]:
    """From the format, of the group where it has one; a form says of itself whether it holds integers or floats."""
    name = _choice(fields, "format", (*_FORMS, _MIXED), _MIXED)
    if group.has("format") or name == _MIXED:
        name = _choice(group, "format", tuple(_FORMS))
    kind = _choice(weights, "type", ("int", "float"), "int")
    form = _FORMS[name]
    if name == "naive-quantized":
        form = "float" if kind == "float" else "int"
    if (form == "float") != (kind == "float"):
        raise weights.error(f"type is {kind} where the format is {name}; download config.json again")
    return form


def _choice(fields: JsonObject, name: str, accepted: tuple[str, ...], default: str | None = None) -> Any:
    """A text, lower case, that is one of those accepted."""
    value = fields.text(name, default).lower()
    if value not in accepted:
        raise fields.error(f"{name} is {short(value)}, which is not supported; {' or '.join(accepted)} is needed")
    return value


def _bits(fields: JsonObject, name: str, accepted: tuple[int, ...]) -> int:
    bits = fields.count(name)
    if bits not in accepted:
        raise fields.error(f"{name} is {bits}, which is not supported; {' or '.join(map(str, accepted))} is needed")
    return bits


def _group_size(fields: JsonObject, name: str) -> int | None:
    """None for -1: all inputs are one group."""
    return None if fields.fields.get(name) == -1 else fields.count(name)


def _block(fields: JsonObject, name: str) -> tuple[int, int]:
    value = fields.fields.get(name)
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int and 0 < each < 2**31 for each in value):
        raise fields.error(f"{name} is {short(value)}; rows and columns of a block are needed")
    return value[0], value[1]


def _flag(fields: JsonObject, name: str, default: bool) -> bool:
    return fields.flag(name) if fields.has(name) else default


_READERS: dict[str, Callable[[JsonObject], tuple[Scheme, ...]]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
}
"""quant_method -> what reads its settings."""
