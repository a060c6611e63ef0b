"""RoPE in config.json, as transformers 4 and 5 write it, to and from RopeSpec. Knows nothing of the rest of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.shown import short
from offload_sirius_loaders.spec import ROPE_KINDS, RopeKind, RopeSpec

DEFAULT_THETA = 10000.0
"""rope_theta where a file has none, in all four architectures."""
MAX_FACTOR = 2**16
"""Most stretch of positions believed."""

_NEEDED: dict[RopeKind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_ORIGINAL = "original_max_position_embeddings"
_NOT_PARAMETERS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rope(config: JsonObject) -> RopeSpec:
    """RoPE of a config.json.

    transformers 4 keeps `rope_theta` apart and names the kind `type` or `rope_type` in `rope_scaling`; transformers 5 keeps all
    of it in `rope_parameters`. `dynamic` always gets `original_max_position_embeddings` = max_position_embeddings, the length
    from which its frequencies change. Raises CheckpointError for a kind that is not in ROPE_KINDS, and for parameters that are
    absent or out of range.
    """
    scaling = _scaling(config)
    kind = _kind(scaling)
    theta = config.number("rope_theta", DEFAULT_THETA, above=1)
    theta = scaling.number("rope_theta", theta, above=1)
    _check_parameters(scaling, kind)
    for where in (config, scaling):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise where.error(f"partial_rotary_factor is {where.fields['partial_rotary_factor']}; only 1 is supported")
    parameters = _numbers(scaling)
    if kind == "dynamic":
        parameters[_ORIGINAL] = config.count("max_position_embeddings")
    return RopeSpec(kind=kind, theta=theta, parameters=parameters)


def stretched_positions(rope: RopeSpec, config_positions: int) -> int:
    """Longest sequence, where config.json says `max_position_embeddings` = config_positions.

    linear and dynamic: that, times factor. yarn: original length times factor, where the file gives it and it is larger.
    llama3 and default: as it is.
    """
    factor = rope.parameters.get("factor", 1.0)
    if rope.kind in ("linear", "dynamic"):
        return int(config_positions * factor)
    if rope.kind == "yarn":
        return max(config_positions, int(rope.parameters.get(_ORIGINAL, 0) * factor))
    return config_positions


def rope_fields(rope: RopeSpec, max_positions: int) -> dict[str, Any]:
    """The fields of config.json that the two above read back, in the terms of transformers 4, which 5 reads too."""
    config_positions = max_positions
    if rope.kind in ("linear", "dynamic"):
        config_positions = math.ceil(max_positions / rope.parameters["factor"])
    scaling = None if rope.kind == "default" else {"rope_type": rope.kind, **rope.parameters}
    return {"max_position_embeddings": config_positions, "rope_theta": rope.theta, "rope_scaling": scaling}


def _scaling(config: JsonObject) -> JsonObject:
    name = "rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters"
    value = config.fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise config.error(f"{name} is {short(value)}; it must be an object")
    return JsonObject(f"{config.source}: {name}", value)


def _kind(scaling: JsonObject) -> RopeKind:
    name = "rope_type" if scaling.has("rope_type") else "type"
    found = scaling.text(name, "default")
    for kind in ROPE_KINDS:
        if found == kind:
            return kind
    raise scaling.error(f"RoPE kind {short(found)} is not supported; known are {', '.join(ROPE_KINDS)}")


def _check_parameters(scaling: JsonObject, kind: RopeKind) -> None:
    for name in _NEEDED[kind]:
        scaling.number(name)
    if kind != "default" and not 1 <= scaling.number("factor") <= MAX_FACTOR:
        raise scaling.error(f"factor is {scaling.fields['factor']}; it must be between 1 and {MAX_FACTOR}")
    if scaling.has(_ORIGINAL):
        scaling.count(_ORIGINAL)
    if kind == "llama3":
        _check_order(scaling, "low_freq_factor", "high_freq_factor", 1, 4)
    if kind == "yarn":
        _check_order(scaling, "beta_slow", "beta_fast", 1, 32)


def _check_order(scaling: JsonObject, low_name: str, high_name: str, low_default: float, high_default: float) -> None:
    low, high = scaling.number(low_name, low_default), scaling.number(high_name, high_default)
    if low >= high:
        raise scaling.error(f"{low_name} is {low:g} and {high_name} is {high:g}; the first must be smaller")


def _numbers(scaling: JsonObject) -> dict[str, float | bool]:
    """Every parameter but kind and theta, as a number: what is neither number nor bool would be lost without a word."""
    parameters: dict[str, float | bool] = {}
    for name, value in scaling.fields.items():
        if name in _NOT_PARAMETERS or value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not -1e30 < value < 1e30:
            raise scaling.error(f"{short(name)} is {short(value)}; it must be a number, true or false")
        parameters[name] = value
    return parameters
