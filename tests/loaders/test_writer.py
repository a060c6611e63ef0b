"""Writing a folder: read back equal, loaded by transformers, all or nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.arch import model_spec
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.spec import ModelSpec, RopeSpec
from offload_sirius_loaders.synthetic import SyntheticCheckpoint, open_synthetic
from offload_sirius_loaders.writer import write_checkpoint

CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "eos_token_id": [2, 3], "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"sliding_window": 32},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
    "qwen3": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}},
}


def synthetic_of(model_type: str, stored_dtype: str = "F32") -> Checkpoint:
    spec = model_spec(CONFIG | {"model_type": model_type} | ARCHITECTURES[model_type], None, name=model_type)
    return SyntheticCheckpoint(spec=replace(spec, stored_dtype=stored_dtype), seed=0)


def tensors_of(checkpoint: Checkpoint) -> dict[Any, np.ndarray[Any, Any]]:
    return {key: checkpoint.read(*key) for key in checkpoint.tensors}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("max_shard_nbytes", [2**31, 50_000])
def test_a_written_checkpoint_is_read_back_equal(dtype: str, max_shard_nbytes: int, tmp_path: Path) -> None:
    original = open_synthetic(f"synthetic:tiny?dtype={dtype}")
    write_checkpoint(original, tmp_path / "m", max_shard_nbytes)
    copy = open_checkpoint(str(tmp_path / "m"))
    assert copy.spec == replace(original.spec, name="m")
    for key, values in tensors_of(original).items():
        np.testing.assert_array_equal(copy.read(*key), values)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_loads_a_written_checkpoint_of_each_architecture(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(2)
    original = synthetic_of(model_type)
    write_checkpoint(original, tmp_path / "m", max_shard_nbytes=100_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32
    loaded = model.state_dict()["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(loaded.numpy(), original.read(1, "down"))
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(40)[None]).logits).all()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_fields_that_a_config_leaves_out_are_those_of_the_transformers_class(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    required = {name: CONFIG[name] for name in CONFIG if name not in ("num_key_value_heads", "head_dim")}
    required |= {"num_attention_heads": 32, "hidden_size": 256}
    ours = model_spec(required | {"model_type": model_type}, None, name="m")
    theirs = transformers.AutoConfig.for_model(model_type, **required)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.activation == theirs.hidden_act
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.layer_windows[0] == getattr(theirs, "sliding_window", None)


def test_a_folder_of_shards_has_an_index_that_names_each_tensor(tmp_path: Path) -> None:
    checkpoint = open_synthetic("synthetic:tiny")
    write_checkpoint(checkpoint, tmp_path / "m", max_shard_nbytes=100_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all((tmp_path / "m" / shard).stat().st_size < 100_000 + 10_000 for shard in shards)
    assert index["weight_map"].keys() == {info.name for info in checkpoint.tensors.values()}
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in checkpoint.tensors.values())


def test_progress_counts_every_byte_of_weights_once(tmp_path: Path) -> None:
    checkpoint = open_synthetic("synthetic:tiny?vocab=200000")  # an embedding of more than one piece
    written: list[int] = []
    write_checkpoint(checkpoint, tmp_path / "m", progress=written.append)
    assert sum(written) == sum(info.nbytes for info in checkpoint.tensors.values())
    assert len(written) > len(checkpoint.tensors)


def test_a_checkpoint_of_files_is_written_again_with_its_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(synthetic_of("qwen3"), tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").write_text('{"version": "1.0"}')
    first = open_checkpoint(str(tmp_path / "first"))
    write_checkpoint(first, tmp_path / "second", max_shard_nbytes=100_000)
    second = open_checkpoint(str(tmp_path / "second"))
    assert second.spec == replace(first.spec, name="second")
    assert second.tokenizer.directory == tmp_path / "second"
    for key, values in tensors_of(first).items():
        np.testing.assert_array_equal(second.read(*key), values)


def test_a_folder_that_exists_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match=r"m: exists already; give a folder that does not, or remove it"):
        write_checkpoint(open_synthetic("synthetic:tiny"), tmp_path / "m")
    assert list(tmp_path.rglob("*")) == [tmp_path / "m"]


def test_a_parent_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its parent folder does not exist; create it first"):
        write_checkpoint(open_synthetic("synthetic:tiny"), tmp_path / "no" / "m")


class DiskUsage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_is_refused_with_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 2**40, 2**31))
    with pytest.raises(CheckpointError, match=r"the disk has 2\.00 GiB free, 131\.42 GiB are needed"):
        write_checkpoint(open_synthetic("synthetic:llama-3-70b"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug")])
def test_an_interruption_leaves_nothing_behind(error: BaseException, tmp_path: Path) -> None:
    def interrupt(nbytes: int) -> None:
        assert [path.name.startswith(".m.partial-") for path in tmp_path.iterdir()] == [True]
        raise error

    with pytest.raises(type(error)):
        write_checkpoint(open_synthetic("synthetic:tiny"), tmp_path / "m", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_told_in_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="m: cannot be written: No space left on device; nothing was left behind"):
        write_checkpoint(open_synthetic("synthetic:tiny"), tmp_path / "m", progress=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qkv_bias": True}, "output_bias = False|qkv_bias = True"),
        ({"qk_norm": True}, "qk_norm = True"),
        ({"layer_windows": (5, None, None, None)}, "layer_windows = "),
        ({"rope": RopeSpec(theta=0.5)}, "rope_theta is 0.5"),
    ],
)
def test_a_model_that_config_json_cannot_describe_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    spec: ModelSpec = replace(open_synthetic("synthetic:tiny").spec, **changes)
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(SyntheticCheckpoint(spec=spec, seed=0), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
