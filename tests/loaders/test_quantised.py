"""Quantised safetensors: every way gives the numbers that it stands for, and every contradiction one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from offload_sirius_loaders import by_input
from offload_sirius_loaders.checkpoint import Checkpoint, read_rows
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.json_object import JsonObject
from offload_sirius_loaders.packing import FLOAT8_E4M3
from offload_sirius_loaders.quantisation import read_schemes
from offload_sirius_loaders.safetensors import open_safetensors
from offload_sirius_loaders.writer import write_checkpoint

from .quantised import WAYS, awq, change, change_settings, compressed, gptq, write_pair

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Way -> the quantised folder and the plain one."""
    return {name: write_pair(way, tmp_path_factory.mktemp("way")) for name, way in WAYS.items()}


def opened(pair: tuple[Path, Path]) -> tuple[Checkpoint, Checkpoint]:
    return open_safetensors(pair[0], "m"), open_safetensors(pair[1], "m")


@pytest.mark.parametrize("way", WAYS)
def test_every_tensor_has_the_numbers_that_it_stands_for(way: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    quantised, dense = opened(pairs[way])
    for key, info in quantised.tensors.items():
        assert info.shape == dense.tensors[key].shape
        np.testing.assert_array_equal(quantised.read(*key), dense.read(*key), err_msg=info.name)


@pytest.mark.parametrize("way", WAYS)
def test_any_rows_are_decoded_as_in_the_whole(
    way: str, pairs: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in ("GROUP_NBYTES", "ANY_ORDER_NBYTES"):
        monkeypatch.setattr(by_input, limit, 1)
    quantised, dense = opened(pairs[way])
    for role in ("up", "down", "k"):
        info, numbers = quantised.tensors[1, role], dense.read(1, role)  # type: ignore[index,arg-type]
        stored, step = numbers.T if info.transposed else numbers, info.row_multiple
        for num_rows in (step, 3 * step):
            for first in range(0, info.num_rows, num_rows):
                count = min(num_rows, info.num_rows - first)
                rows = quantised.decode(info, read_rows(info, first, count), first, count)
                np.testing.assert_array_equal(rows, stored[first : first + count])


@pytest.mark.parametrize("way", WAYS)
def test_stored_bytes_are_those_of_the_file(way: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    quantised, _ = opened(pairs[way])
    path = pairs[way][0] / "model.safetensors"
    used = sum(info.nbytes + sum(each.nbytes for each in info.companions) for info in quantised.tensors.values())
    header_nbytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:header_nbytes])
    unused = [entry["data_offsets"] for name, entry in header.items() if name.endswith(("weight_shape", "input_scale"))]
    assert used == path.stat().st_size - header_nbytes - sum(end - start for start, end in unused)


@pytest.mark.parametrize(
    ("way", "dtype"),
    [("awq", "AWQ4"), ("gptq, 8 bits", "GPTQ8"), ("int4 groups", "INT4"), ("int8", "INT8"), ("fbgemm", "F8_E4M3")],
)
def test_the_stored_dtype_is_that_of_the_quantised_matrices(way: str, dtype: str, pairs: dict[str, tuple[Path, Path]]) -> None:
    assert opened(pairs[way])[0].spec.stored_dtype == dtype


def test_rows_of_a_group_are_kept_together_within_limits(
    pairs: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def multiple(way: str) -> int:
        return opened(pairs[way])[0].tensors[0, "up"].row_multiple

    assert [multiple(way) for way in ("awq", "awq, one group", "gptq", "gptq, any order")] == [16, 1, 16, 48]
    monkeypatch.setattr(by_input, "GROUP_NBYTES", 4 * 40 * 12)
    monkeypatch.setattr(by_input, "ANY_ORDER_NBYTES", 4 * 40 * 30)
    assert [multiple(way) for way in ("awq", "gptq", "gptq, any order")] == [12, 8, 24]


def test_a_quantised_checkpoint_can_be_written_in_plain_numbers(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    quantised, dense = opened(pairs["gptq, any order"])
    write_checkpoint(quantised, tmp_path / "plain")
    written = open_safetensors(tmp_path / "plain", "m")
    for key in dense.tensors:
        np.testing.assert_array_equal(written.read(*key), dense.read(*key))


def test_eight_bit_floats_are_those_of_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(FLOAT8_E4M3, codes.view(torch.float8_e4m3fn).float().numpy())


def test_zero_points_of_gptq_wrap(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs["gptq, asymmetric"][0], tmp_path / "m"))
    change(folder, qzeros=torch.full((3, 5), -1, dtype=torch.int32), qweight=torch.zeros((6, 40), dtype=torch.int32))
    assert not open_safetensors(folder, "m").read(0, "up").any()


def test_layers_may_be_quantised_in_several_ways_and_left_plain(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs["int4 groups"][0], tmp_path / "m"))
    plain = torch.ones((37, 54), dtype=torch.bfloat16)
    change(folder, weight=plain, weight_packed=None, weight_scale=None, weight_shape=None)
    first = compressed("pack-quantized", num_bits=8)["config_groups"]["group_0"] | {"format": "pack-quantized"}
    second = compressed("pack-quantized", num_bits=4, strategy="group", group_size=16)["config_groups"]["group_0"]
    activations = {"targets": ["Linear"], "weights": None, "input_activations": {}}
    groups = {"a": first, "b": second | {"format": "pack-quantized"}, "c": activations}
    change_settings(folder, format="mixed-precision", config_groups=groups)
    checkpoint, dense = open_safetensors(folder, "m"), open_safetensors(pairs["int4 groups"][1], "m")
    assert checkpoint.tensors[0, "up"].dtype == "BF16"
    np.testing.assert_array_equal(checkpoint.read(0, "gate"), dense.read(0, "gate"))


def test_an_order_of_minus_one_is_none(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs["int4 groups"][0], tmp_path / "m"))
    change(folder, weight_g_idx=torch.full((54,), -1, dtype=torch.int32))
    expected = open_safetensors(pairs["int4 groups"][1], "m").read(0, "up")
    np.testing.assert_array_equal(open_safetensors(folder, "m").read(0, "up"), expected)


def message_of(folder: Path) -> str:
    """The one line with which opening the model, or reading the changed tensor, fails."""
    with pytest.raises(CheckpointError) as caught:
        open_safetensors(folder, "m").read(0, "up")
    message = str(caught.value)
    assert "\n" not in message
    return message


def error_of(action: Callable[[], object]) -> str:
    """The message of its CheckpointError, empty where it succeeds. Any other error fails the test."""
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return ""


def ints(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("way", "changes", "message"),
    [
        (
            "awq",
            {"qzeros": None},
            "{folder}: tensor {up}.qzeros is missing, without which its layer cannot be read with AWQ, bits 4",
        ),
        ("awq", {"scales": None}, "{folder}: tensor {up}.scales is missing"),
        (
            "awq",
            {"qweight": ints(48, 4)},
            "{file}: tensor {up}.qweight has shape [48, 4], [48, 5] is needed with AWQ, bits 4 and",
        ),
        ("awq", {"qweight": ints(5, 48)}, "{file}: tensor {up}.qweight has shape [5, 48], [48, 5] is needed"),
        ("awq", {"qweight": torch.zeros(48, 5)}, "{file}: tensor {up}.qweight is stored as F32, I32 is needed"),
        ("awq", {"scales": ints(3, 40)}, "{file}: tensor {up}.scales is stored as I32, F32 or F16 or BF16 is needed"),
        ("awq", {"scales": torch.zeros(2, 40)}, "{file}: tensor {up}.scales has shape [2, 40], [3, 40] is needed"),
        ("awq", {"qzeros": ints(3, 4)}, "{file}: tensor {up}.qzeros has shape [3, 4], [3, 5] is needed"),
        ("awq", {"weight": torch.zeros(40, 48)}, "{file}: tensor {up}.weight is no part of a layer that is quantised so"),
        ("awq", {"perm": ints(48)}, "{file}: tensor {up}.perm is no part of a layer that is quantised so"),
        ("gptq", {"qweight": ints(48, 5)}, "{file}: tensor {up}.qweight has shape [48, 5], [6, 40] is needed with GPTQ"),
        ("gptq", {"g_idx": ints(47)}, "{file}: tensor {up}.g_idx has shape [47], [48] is needed"),
        ("gptq", {"g_idx": ints(48)}, "{up}.g_idx: groups do not follow each other, which desc_act = false in config.json says"),
        ("gptq, any order", {"g_idx": None}, "{folder}: tensor {up}.g_idx is missing"),
        ("gptq, any order", {"g_idx": ints(48) + 3}, "{up}.g_idx: holds 3, numbers of groups from 0 to 2 are needed"),
        ("gptq, any order", {"g_idx": ints(48) - 1}, "{up}.g_idx: holds -1, numbers of groups from 0 to 2 are needed"),
        ("int4 groups", {"weight_scale": None}, "{folder}: tensor {up}.weight_scale is missing"),
        ("int4 groups", {"weight_packed": ints(37, 6)}, "{file}: tensor {up}.weight_packed has shape [37, 6], [37, 7] is needed"),
        ("int4 groups", {"weight_packed": None}, "{file}: tensor {up}.weight_scale belongs to a layer that is not stored as"),
        ("int8", {"weight": torch.zeros(37, 54)}, "{file}: tensor {up}.weight_scale belongs to a layer that is not stored as"),
        ("int4 groups", {"weight_scale": torch.zeros(37, 5)}, "{file}: tensor {up}.weight_scale has shape [37, 5], [37, 4] is"),
        ("int4 groups", {"weight_global_scale": torch.zeros(1)}, "{file}: tensor {up}.weight_global_scale is no part of"),
        ("int4 groups with zero points", {"weight_zero_point": None}, "{folder}: tensor {up}.weight_zero_point is missing"),
        (
            "int4 groups with zero points",
            {"weight_zero_point": ints(37, 4)},
            "{file}: tensor {up}.weight_zero_point has shape [37, 4], [5, 4] is needed",
        ),
        (
            "int4 groups in any order",
            {"weight_g_idx": ints(53)},
            "{file}: tensor {up}.weight_g_idx has shape [53], [54] is needed",
        ),
        ("int4 groups in any order", {"weight_g_idx": ints(54) + 4}, "{up}.weight_g_idx: holds 4, numbers of groups from 0 to 3"),
        ("int8", {"weight_scale": torch.zeros(36, 1)}, "{file}: tensor {up}.weight_scale has shape [36, 1], [37, 1] or [37] is"),
        ("fp8 blocks", {"weight_scale_inv": None}, "{folder}: tensor {up}.weight_scale_inv is missing"),
        (
            "fp8 blocks",
            {"weight_scale_inv": torch.zeros(2, 4)},
            "{file}: tensor {up}.weight_scale_inv has shape [2, 4], [3, 4] is needed with floats of 8 bits and a scale for each "
            "block of 16 x 16; download config.json and weights of the same model",
        ),
        ("fp8 with a scale a tensor", {"weight_scale": torch.zeros(2)}, "{file}: tensor {up}.weight_scale has shape [2],"),
    ],
)
def test_headers_that_contradict_config_json_are_refused(
    way: str, changes: dict[str, Tensor | None], message: str, pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pairs[way][0], tmp_path / "m"))
    change(folder, **changes)
    assert message_of(folder).startswith(message.format(folder=folder, file=folder / "model.safetensors", up=UP))


def test_a_word_that_is_not_filled_is_refused(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs["awq"][0], tmp_path / "m"))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"intermediate_size": 40', '"intermediate_size": 41'))
    assert "gate_proj.qweight packs 8 outputs in a word with AWQ, bits 4 and group_size 16, the layer has 41" in message_of(
        folder
    )


def test_a_quantised_head_is_refused(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs["awq"][0], tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    head = {"qweight": ints(48, 8), "qzeros": ints(3, 8), "scales": torch.zeros(3, 64)}
    save_file(tensors | {f"lm_head.{word}": tensor for word, tensor in head.items()}, folder / "model.safetensors")
    assert "tensor lm_head.qweight is quantised; embedding and head must be plain" in message_of(folder)


def test_quantised_weights_without_a_word_in_config_json_are_told_as_that(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pairs["awq"][0], tmp_path / "m"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    assert "q_proj.weight is missing, which config.json asks for; its layer is quantised: quantization_config in" in message_of(
        folder
    )


WEIGHTS = compressed("pack-quantized")["config_groups"]["group_0"]["weights"]


def grouped(weights: Fields | None = None, **fields: Any) -> Fields:
    found = compressed("pack-quantized")
    found["config_groups"]["group_0"]["weights"] = WEIGHTS | (weights or {})
    return found | fields


GROUP = "quantization_config: 'group_0': weights: "


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "fp8",
            "the checkpoint is quantised by 'fp8', which is not supported; supported are awq, gptq, compressed-tensors, fp8,",
        ),
        ({}, "the checkpoint is quantised by None, which is not supported"),
        *(
            ({"quant_method": method}, f"the checkpoint is quantised by {method!r}, which is not supported")
            for method in ("bitsandbytes", "hqq", "aqlm", "exl2", "quanto", "eetq", "mxfp4")
        ),
        ({"quant_method": ["awq"]}, "the checkpoint is quantised by ['awq'], which is not supported"),
        (awq(bits=3), "quantization_config: bits is 3, which is not supported; 4 is needed"),
        (awq(version="gemv"), "quantization_config: version is 'gemv', which is not supported; gemm is needed"),
        (awq(backend="llm-awq"), "quantization_config: backend is llm-awq; that order of the weights is not supported"),
        (awq(group_size=0), "quantization_config: group_size is 0; it must be a whole number between 1 and"),
        (awq(group_size=None), "quantization_config: q_group_size is missing"),
        (gptq(bits=2), "quantization_config: bits is 2, which is not supported; 4 or 8 is needed"),
        (gptq(checkpoint_format="marlin"), "quantization_config: checkpoint_format is 'marlin', which is not supported"),
        (gptq(is_marlin_format=True), "quantization_config: is_marlin_format is true;"),
        (gptq(pack_dtype="int16"), "quantization_config: pack_dtype is 'int16', which is not supported; int32 is needed"),
        (
            gptq(dynamic={"+:mlp": {"bits": 8}}),
            "quantization_config: dynamic is {'+:mlp': {'bits': 8}}; settings that are the same",
        ),
        (gptq(dynamic=3), "quantization_config: dynamic is 3;"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "quantization_config: fmt is 'e5m2', which is not supported"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            "quantization_config: weight_block_size is [128]; rows and columns",
        ),
        ({"quant_method": "compressed-tensors"}, "quantization_config: config_groups is None; an object"),
        (grouped(format="nvfp4-pack-quantized"), "quantization_config: format is 'nvfp4-pack-quantized', which is not supported"),
        (grouped(sparsity_config={"format": "sparse-24-bitmask"}), "quantization_config: sparsity_config is {'format': 'sparse"),
        (grouped(transform_config={"config_groups": {"v": {}}}), "quantization_config: transform_config is {'config_groups'"),
        (grouped(config_groups={"g": 3}), "quantization_config: 'g' of config_groups is 3; an object is needed"),
        (grouped(config_groups={"g": {"weights": 3}}), "quantization_config: 'g': weights is 3; an object"),
        (grouped({"num_bits": 2}), GROUP + "num_bits is 2, which is not supported; 4 or 8 is needed"),
        (grouped({"strategy": "token"}), GROUP + "strategy is 'token', which is not supported"),
        (grouped({"strategy": "group"}), GROUP + "group_size is missing"),
        (grouped({"type": "float"}), GROUP + "type is float where the format is pack-quantized"),
        (
            compressed("float-quantized", type="float", symmetric=False),
            GROUP + "symmetric is false; floats with zero points are not supported",
        ),
    ],
)
def test_what_is_quantised_in_another_way_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_schemes(JsonObject("config.json", {"quantization_config": value}))
    assert str(caught.value).startswith(f"config.json: {message}")
    assert "\n" not in str(caught.value)


def test_the_older_name_of_the_settings_is_known() -> None:
    found = {name: value for name, value in compressed("pack-quantized").items() if name != "quant_method"}
    named = [{"compression_config": found}, {"quantization_config": compressed("pack-quantized")}]
    assert read_schemes(JsonObject("c", named[0])) == read_schemes(JsonObject("c", named[1]))
    assert read_schemes(JsonObject("c", {})) == ()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
GOOD = [awq(), gptq(), grouped(), {"quant_method": "fp8", "weight_block_size": [16, 16], "fmt": "e4m3"}]
NAMES = sorted({name for good in GOOD for name in good} | {"dynamic", "transform_config", "sparsity_config", "backend"})


@settings(max_examples=200, deadline=None)
@given(good=st.sampled_from(GOOD), fields=st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, max_size=3), weights=JSON_VALUES)
def test_no_value_in_the_settings_raises_anything_but_a_checkpoint_error(good: Fields, fields: Fields, weights: Any) -> None:
    grouped_weights = {"config_groups": {"g": {"weights": weights if isinstance(weights, dict) else WEIGHTS | {"type": weights}}}}
    for value in (good | fields, good | grouped_weights, good | {"config_groups": {"g": weights}}, weights):
        assert "\n" not in error_of(partial(read_schemes, JsonObject("c", {"quantization_config": value})))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(way=st.sampled_from(["awq", "gptq, any order", "int4 groups with zero points", "fp8 blocks"]), data=st.data())
def test_no_shape_or_type_in_a_header_raises_anything_but_a_checkpoint_error(
    way: str, data: st.DataObject, pairs: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = (pairs[way][0] / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    name = data.draw(st.sampled_from(sorted(name for name in header if UP in name)))
    entry = header[name]
    nbytes = entry["data_offsets"][1] - entry["data_offsets"][0]
    entry["dtype"], item_nbytes = data.draw(st.sampled_from([("I32", 4), ("F32", 4), ("F16", 2), ("I8", 1), ("F8_E4M3", 1)]))
    count = nbytes // item_nbytes
    rows = data.draw(st.sampled_from([rows for rows in range(1, count + 1) if count % rows == 0]))
    entry["shape"] = data.draw(st.sampled_from([[rows, count // rows], [count], [count // rows, rows], [1, rows, count // rows]]))
    folder = tmp_path_factory.mktemp("shaped")
    shutil.copy(pairs[way][0] / "config.json", folder)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    assert "\n" not in error_of(lambda: open_safetensors(folder, "m").read(0, "up"))
