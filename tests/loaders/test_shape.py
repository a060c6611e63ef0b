"""The shape of a model that is not here: published, or config.json alone. The hub is not asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_sirius_loaders import CheckpointError, shape
from offload_sirius_loaders.shape import open_shape

CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float16",
}


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub ids whose config.json was asked for; nothing is cached."""
    asked: list[str] = []
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))

    def fetch(hub_id: str) -> Path:
        asked.append(hub_id)
        return path

    monkeypatch.setattr(shape, "is_cached", lambda _: False)
    monkeypatch.setattr(shape, "fetch_config", fetch)
    return asked


@pytest.mark.parametrize("name", ["llama-3-70b", "meta-llama/Meta-Llama-3-70B-Instruct"])
def test_a_published_shape_is_taken_where_the_weights_are_not_here(name: str, fetched: list[str]) -> None:
    opened = open_shape(name)
    assert (opened.checkpoint.spec.name, opened.checkpoint.spec.num_layers, opened.computed) == (name, 80, False)
    assert opened.found == "the published shape of llama-3-70b, as its weights are not on this machine"
    assert sum(info.nbytes for info in opened.checkpoint.tensors.values()) == 2 * 70_553_706_496
    assert fetched == []


@pytest.mark.parametrize(("name", "hub_id"), [("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"), ("someone/model", "someone/model")])
def test_else_config_json_alone_is_fetched(name: str, hub_id: str, fetched: list[str]) -> None:
    opened = open_shape(name)
    assert fetched == [hub_id]
    assert opened.found == f"config.json of {hub_id} from the hub, as its weights are not on this machine"
    assert (opened.checkpoint.spec.num_layers, opened.checkpoint.spec.stored_dtype) == (3, "F16")
    assert opened.checkpoint.tensors[0, "q_bias"].shape == (64,)


@pytest.mark.parametrize("written", [{}, {"torch_dtype": "float32"}])
def test_a_quantised_model_that_is_not_here_counts_16_bits_and_says_so(
    written: dict[str, str], tmp_path: Path, fetched: list[str]
) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": settings} | written))
    opened = open_shape("someone/model-awq")
    assert opened.found.endswith("; they are quantised, and here counted as if each had 16 bits on the disk")
    assert opened.checkpoint.spec.stored_dtype == "BF16"


def test_what_is_here_is_opened_as_it_is(tiny_directory: Path, fetched: list[str]) -> None:
    assert open_shape(str(tiny_directory)).found == open_shape("synthetic:tiny").found == ""
    assert not open_shape(str(tiny_directory)).computed
    assert open_shape("synthetic:tiny").computed
    assert fetched == []


@pytest.mark.parametrize("name", ["nonsense", "./no/such/folder", "synthetic:nonsense", "model.gguf"])
def test_what_no_model_is_called_is_refused_as_when_it_is_opened(name: str, fetched: list[str]) -> None:
    with pytest.raises(CheckpointError):
        open_shape(name)
    assert fetched == []
