"""The shape of a model whose weights need not be here: for planning. Reads headers and config.json, downloads no weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from offload_sirius_loaders import hub_id_of, open_checkpoint
from offload_sirius_loaders.arch import model_spec
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.hub import ALIASES, fetch_config, is_cached
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.quantisation import read_schemes
from offload_sirius_loaders.synthetic import SHAPES, SyntheticCheckpoint

_STORED_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model's headers, as they are or as its files would have them."""

    checkpoint: Checkpoint
    found: str
    """Where the shape comes from, in one line; empty where it is the model's own files or a synthetic shape."""
    computed: bool
    """Synthetic: no file holds the weights."""


def open_shape(model: str) -> Shape:
    """The shape of whatever `open_checkpoint` accepts, without its weights where they are not on this machine.

    Then a shape published under that name is taken, else config.json is fetched from the hub. Raises CheckpointError.
    """
    hub_id = hub_id_of(model)
    if hub_id is None or is_cached(hub_id):
        checkpoint = open_checkpoint(model)
        return Shape(checkpoint=checkpoint, found="", computed=checkpoint.path is None)
    alias = next((alias for alias in SHAPES if ALIASES.get(alias) == hub_id), None)
    if alias is not None:
        found = f"the published shape of {alias}, as its weights are not on this machine"
        return Shape(checkpoint=_checkpoint(SHAPES[alias], model, alias), found=found, computed=False)
    path = fetch_config(hub_id)
    found = f"config.json of {hub_id} from the hub, as its weights are not on this machine"
    if read_schemes(JsonObject.read(path)):
        found += "; they are quantised, and here counted as if each had 16 bits on the disk"
    return Shape(checkpoint=_checkpoint(_config(path), model, str(path)), found=found, computed=False)


def _config(path: Path) -> Mapping[str, Any]:
    return JsonObject.read(path).fields


def _checkpoint(config: Mapping[str, Any], name: str, source: str) -> Checkpoint:
    """The tensors that the model's files would hold; 16 bits a number where those are quantised.

    Newer files say dtype where older ones say torch_dtype.
    """
    quantised = read_schemes(JsonObject(source, config))
    dtype = None if quantised else config.get("dtype") or config.get("torch_dtype")
    spec = model_spec(config, None, name=name, source=source)
    return SyntheticCheckpoint(spec=replace(spec, stored_dtype=_STORED_DTYPES.get(str(dtype), "BF16")), seed=0)
