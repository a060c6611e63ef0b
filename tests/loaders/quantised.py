"""Small llama models in every way of quantising that is read, each beside the same numbers in float32.

Packing and the plain numbers are written out element by element, from what the formats' own packages document.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload_sirius_loaders.arch import model_spec, tensor_names, tensor_shapes
from offload_sirius_loaders.checkpoint import Checkpoint, TokenizerFiles
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.linear import Linear
from offload_sirius_loaders.quantisation import read_schemes
from offload_sirius_loaders.safetensors import SafetensorsCheckpoint
from offload_sirius_loaders.shard import read_shard

CONFIG = {
    "model_type": "llama",
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 40,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
ODD_CONFIG = CONFIG | {"hidden_size": 54, "intermediate_size": 37}
"""Sizes that fill neither words nor groups nor blocks."""
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
E4M3_CODES = [code for code in range(256) if code & 127 < 64]
"""8-bit floats up to 1.875."""

Numbers = np.ndarray[Any, Any]
Layer = tuple[dict[str, Tensor], Numbers]
"""What the files have of a linear layer, and its matrix [out, in] in plain numbers."""


@dataclass(frozen=True)
class Way:
    """One way of quantising."""

    settings: dict[str, Any]
    """quantization_config"""
    layer: Callable[[np.random.Generator, int, int], Layer]
    """(random numbers, outputs, inputs)"""
    config: dict[str, Any] = field(default_factory=lambda: CONFIG)
    scheme: int = 0
    """Which one of those that the settings leave open."""


def cells(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    return ((row, column) for row in range(rows) for column in range(columns))


def words(codes: Numbers, bits: int, axis: int, order: list[int] | None = None) -> Tensor:
    """Unsigned integers packed along an axis into int32, the first in the lowest bits; order: which one is at place i instead."""
    codes = codes if axis == 1 else codes.T
    per_word = 32 // bits
    order = order or list(range(per_word))
    packed = np.zeros((codes.shape[0], -(-codes.shape[1] // per_word)), np.uint32)
    for row, word in cells(*packed.shape):
        for place in range(per_word):
            column = word * per_word + order[place]
            if column < codes.shape[1]:
                packed[row, word] |= np.uint32(int(codes[row, column]) << (bits * place))
    packed = packed if axis == 1 else packed.T
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


def scales_of(random: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random.uniform(0.005, 0.03, shape)).half()


def by_input(
    method: str,
    *,
    bits: int = 4,
    group: int = 16,
    stored_less: int = 0,
    symmetric: bool = False,
    zeros: bool = True,
    g_idx: str | None = None,
) -> Callable[[np.random.Generator, int, int], Layer]:
    def layer(random: np.random.Generator, num_out: int, num_in: int) -> Layer:
        size = num_in if group == -1 else group
        num_groups = -(-num_in // size)
        codes = random.integers(0, 1 << bits, (num_in, num_out))
        middle = 1 << (bits - 1)
        zero = np.full((num_groups, num_out), middle) if symmetric else random.integers(0, 1 << bits, (num_groups, num_out))
        scales = scales_of(random, (num_groups, num_out))
        groups = np.arange(num_in) // size
        if g_idx == "any order":
            groups = random.permutation(groups)
        dense = np.zeros((num_out, num_in))
        for row, column in cells(num_out, num_in):
            group_id = groups[column]
            dense[row, column] = (codes[column, row] - zero[group_id, row]) * float(scales[group_id, row])
        order = AWQ_ORDER if method == "awq" else None
        tensors = {
            "qweight": words(codes, bits, 1 if method == "awq" else 0, order),
            "qzeros": words((zero - stored_less) % (1 << bits), bits, 1, order),
            "scales": scales,
            "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }
        absent = {"qzeros": not zeros, "g_idx": g_idx is None}
        return {word: tensor for word, tensor in tensors.items() if not absent.get(word)}, dense

    return layer


def grid_of(strategy: str, num_out: int, num_in: int, cell: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of one cell."""
    return {"tensor": (num_out, num_in), "channel": (1, num_in), "group": (1, cell[1]), "block": cell}[strategy]


def by_output(
    form: str,
    strategy: str,
    *,
    bits: int = 8,
    cell: tuple[int, int] = (1, 16),
    symmetric: bool = True,
    any_order: bool = False,
    scale_word: str = "weight_scale",
    scale_dtype: torch.dtype = torch.float32,
    scale_shape: Callable[[tuple[int, int]], tuple[int, ...]] = lambda grid: grid,
    packed_zeros: bool = True,
    extra: dict[str, Tensor] | None = None,
) -> Callable[[np.random.Generator, int, int], Layer]:
    def layer(random: np.random.Generator, num_out: int, num_in: int) -> Layer:
        cell_rows, cell_columns = grid_of(strategy, num_out, num_in, cell)
        grid = (-(-num_out // cell_rows), -(-num_in // cell_columns))
        scales = torch.from_numpy(random.uniform(0.005, 0.03, grid)).to(scale_dtype)
        low, high = -(1 << (bits - 1)), 1 << (bits - 1)
        zero = np.zeros(grid, np.int64) if symmetric else random.integers(low, high, grid)
        groups = np.arange(num_in) // cell_columns
        groups = random.permutation(groups) if any_order else groups
        if form == "float":
            codes = random.choice(E4M3_CODES, (num_out, num_in)).astype(np.uint8)
            stored = torch.from_numpy(codes).view(torch.float8_e4m3fn)
            numbers = stored.float().numpy()
        else:
            numbers = random.integers(low, high, (num_out, num_in))
            stored = torch.from_numpy(numbers.astype(np.int8))
        dense = np.zeros((num_out, num_in))
        for row, column in cells(num_out, num_in):
            where = (row // cell_rows, int(groups[column]))
            dense[row, column] = (float(numbers[row, column]) - float(zero[where])) * float(scales[where])
        tensors = {scale_word: scales.reshape(scale_shape(grid)), **(extra or {})}
        if form == "packed":
            tensors |= {"weight_packed": words(numbers - low, bits, 1), "weight_shape": torch.tensor([num_out, num_in])}
        else:
            tensors["weight"] = stored
        if not symmetric:
            tensors["weight_zero_point"] = words(zero - low, bits, 0) if packed_zeros else torch.from_numpy(zero.astype(np.int8))
        if any_order:
            tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return tensors, dense

    return layer


def awq(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM", "zero_point": True} | settings


def gptq(**settings: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True} | settings


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    described = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": described, "input_activations": None}},
    }


FP8_WEIGHTS = {"type": "float", "num_bits": 8}
ACTIVATION_SCALE = {"input_scale": torch.tensor([0.5])}

WAYS = {
    "awq": Way(awq(), by_input("awq")),
    "awq, a group that does not divide": Way(awq(group_size=32), by_input("awq", group=32)),
    "awq, one group": Way(awq(group_size=-1), by_input("awq", group=-1)),
    "awq without zero points": Way(awq(zero_point=False), by_input("awq", symmetric=True, zeros=False)),
    "gptq": Way(gptq(), by_input("gptq", stored_less=1, symmetric=True, g_idx="natural")),
    "gptq, asymmetric": Way(gptq(sym=False), by_input("gptq", stored_less=1)),
    "gptq, a group that does not divide": Way(gptq(group_size=32), by_input("gptq", group=32, stored_less=1)),
    "gptq, one group": Way(gptq(group_size=-1), by_input("gptq", group=-1, stored_less=1)),
    "gptq, 8 bits": Way(gptq(bits=8), by_input("gptq", bits=8, stored_less=1)),
    "gptq, version 2": Way(gptq(checkpoint_format="gptq_v2"), by_input("gptq")),
    "gptq, any order": Way(gptq(desc_act=True), by_input("gptq", stored_less=1, g_idx="any order")),
    "int4 groups": Way(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=16),
        by_output("packed", "group", bits=4, scale_dtype=torch.bfloat16),
        ODD_CONFIG,
    ),
    "int4 groups with zero points": Way(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=16, symmetric=False),
        by_output("packed", "group", bits=4, symmetric=False),
        ODD_CONFIG,
    ),
    "int4 groups in any order": Way(
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=16, actorder="group"),
        by_output("packed", "group", bits=4, any_order=True),
        ODD_CONFIG,
    ),
    "int8 packed": Way(
        compressed("pack-quantized", symmetric=False), by_output("packed", "channel", symmetric=False), ODD_CONFIG
    ),
    "int8": Way(compressed("int-quantized"), by_output("int", "channel", scale_dtype=torch.bfloat16), ODD_CONFIG),
    "int8 with zero points": Way(
        compressed("int-quantized", symmetric=False), by_output("int", "channel", symmetric=False, packed_zeros=False), ODD_CONFIG
    ),
    "fp8 rows": Way(compressed("float-quantized", **FP8_WEIGHTS), by_output("float", "channel"), ODD_CONFIG),
    "fp8 tensors": Way(
        compressed("float-quantized", strategy="tensor", **FP8_WEIGHTS),
        by_output("float", "tensor", scale_shape=lambda _: (1,), extra=ACTIVATION_SCALE),
        ODD_CONFIG,
    ),
    "fp8 groups": Way(
        compressed("float-quantized", strategy="group", group_size=16, **FP8_WEIGHTS), by_output("float", "group"), ODD_CONFIG
    ),
    "fp8 blocks of compressed-tensors": Way(
        compressed("float-quantized", strategy="block", block_structure=[16, 32], **FP8_WEIGHTS),
        by_output("float", "block", cell=(16, 32)),
        ODD_CONFIG,
    ),
    "fp8 blocks": Way(
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [16, 16]},
        by_output("float", "block", cell=(16, 16), scale_word="weight_scale_inv"),
        ODD_CONFIG,
    ),
    "fp8 with a scale a tensor": Way(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        by_output("float", "tensor", scale_shape=lambda _: (), extra=ACTIVATION_SCALE),
        ODD_CONFIG,
    ),
    "fbgemm": Way(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        by_output("float", "channel"),
        ODD_CONFIG,
        scheme=1,
    ),
}


def write_pair(way: Way, directory: Path) -> tuple[Path, Path]:
    """The model quantised, and the same numbers in float32."""
    random = np.random.default_rng(0)
    spec = model_spec(way.config, None, name="m")
    shapes = tensor_shapes(spec)
    quantised: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for key, name in tensor_names(spec).items():
        shape = shapes[key]
        if key[0] is not None and len(shape) == 2:
            tensors, numbers = way.layer(random, *shape)
            quantised |= {name.removesuffix("weight") + word: tensor for word, tensor in tensors.items()}
            dense[name] = torch.from_numpy(numbers).float()
        else:
            dense[name] = torch.ones(shape) if len(shape) == 1 else torch.from_numpy(random.normal(0, 0.5, shape)).half().float()
            quantised[name] = dense[name].half()
    return (
        _write(directory / "quantised", quantised, way.config | {"quantization_config": way.settings}),
        _write(directory / "dense", dense, way.config),
    )


def one_layer(way: Way, directory: Path, num_out: int, num_in: int) -> Checkpoint:
    """A checkpoint of which only one matrix is there, as up projection of layer 0."""
    stored, _ = way.layer(np.random.default_rng(0), num_out, num_in)
    path = directory / "one.safetensors"
    save_file({f"layer.{word}": tensor.clone().contiguous() for word, tensor in stored.items()}, path)
    tensors = {name.removeprefix("layer."): tensor for name, tensor in read_shard(path).items()}
    linear = Linear(directory=directory, name="layer", num_out=num_out, num_in=num_in, tensors=tensors)
    schemes = read_schemes(JsonObject("config.json", {"quantization_config": way.settings}))
    info, matrix = schemes[way.scheme].open(linear)
    spec = model_spec(way.config, None, name="m")
    return SafetensorsCheckpoint(
        spec=spec, path=directory, tokenizer=TokenizerFiles(), tensors={(0, "up"): info}, quantised={info.name: matrix}
    )


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    # A copy each: safetensors refuses tensors that share memory.
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of layer 0's up projection by the last word of their names; None takes one away."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for word, tensor in changes.items():
        name = f"model.layers.0.mlp.up_proj.{word}"
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


def change_settings(folder: Path, **changes: Any) -> None:
    """Replace fields of quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
