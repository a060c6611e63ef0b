"""config.json to ModelSpec: defaults of the four architectures, RoPE in both styles, windows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from offload_sirius_loaders.arch import config_json, generation_json, model_spec, tensor_names, tensor_shapes
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

REQUIRED = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def spec_of(generation: dict[str, Any] | None = None, **fields: Any) -> ModelSpec:
    return model_spec(REQUIRED | fields, generation, name="m")


def message_of(generation: dict[str, Any] | None = None, **fields: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        spec_of(generation, **fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_llama_config_of_required_fields_only_gets_the_defaults_of_its_class() -> None:
    assert spec_of() == ModelSpec(
        name="m",
        architecture="llama",
        num_layers=3,
        width=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        ffn_width=96,
        vocab_size=300,
        max_positions=1024,
        norm_eps=1e-6,
        rope=RopeSpec(),
        layer_windows=(None, None, None),
        bos_token_id=1,
        eos_token_ids=(2,),
    )


@pytest.mark.parametrize(
    ("fields", "qkv_bias", "output_bias", "qk_norm"),
    [
        ({"model_type": "llama"}, False, False, False),
        ({"model_type": "llama", "attention_bias": True}, True, True, False),
        ({"model_type": "mistral", "num_attention_heads": 8}, False, False, False),
        ({"model_type": "mistral", "num_attention_heads": 8, "attention_bias": True}, False, False, False),
        ({"model_type": "qwen2", "num_attention_heads": 8, "num_key_value_heads": 2}, True, False, False),
        ({"model_type": "qwen3", "num_key_value_heads": 2}, False, False, True),
        ({"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True}, True, True, True),
    ],
)
def test_biases_and_head_norms_follow_the_architecture(
    fields: dict[str, Any], qkv_bias: bool, output_bias: bool, qk_norm: bool
) -> None:
    spec = spec_of(**fields)
    assert (spec.qkv_bias, spec.output_bias, spec.qk_norm) == (qkv_bias, output_bias, qk_norm)


@pytest.mark.parametrize(
    ("fields", "num_kv_heads", "head_dim"),
    [
        ({"model_type": "llama"}, 4, 16),
        ({"model_type": "llama", "num_key_value_heads": 2, "head_dim": 32}, 2, 32),
        ({"model_type": "mistral", "num_attention_heads": 16}, 8, 4),
        ({"model_type": "mistral", "num_key_value_heads": None, "head_dim": None}, 4, 16),
        ({"model_type": "qwen2", "hidden_size": 128, "num_attention_heads": 32}, 32, 4),
        ({"model_type": "qwen2", "num_key_value_heads": None}, 4, 16),
        ({"model_type": "qwen3", "num_attention_heads": 32}, 32, 128),
        ({"model_type": "qwen3", "num_key_value_heads": None, "head_dim": 64}, 4, 64),
    ],
)
def test_absent_head_counts_are_those_of_the_config_class(fields: dict[str, Any], num_kv_heads: int, head_dim: int) -> None:
    spec = spec_of(**fields)
    assert (spec.num_kv_heads, spec.head_dim) == (num_kv_heads, head_dim)


@pytest.mark.parametrize("name", [name for name in REQUIRED if name != "model_type"])
def test_a_missing_required_field_is_named(name: str) -> None:
    assert message_of(**{name: None}).startswith(f"config.json: {name} is missing")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "gemma"}, "architecture 'gemma' is not supported; known are llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": 5}, "model_type is 5; it must be a text"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a whole number between 1 and 2147483647"),
        ({"hidden_size": -64}, "hidden_size is -64;"),
        ({"hidden_size": 64.5}, "hidden_size is 64.5;"),
        ({"hidden_size": True}, "hidden_size is True;"),
        ({"vocab_size": "300"}, "vocab_size is '300';"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000000000000000000000000;"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be a whole number between 1 and 65536"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4 and num_key_value_heads is 3; the first must be a multiple"),
        ({"num_attention_heads": 5}, "hidden_size is 64 and num_attention_heads is 5; the first must be a multiple"),
        ({"head_dim": 15}, "head_dim is 15; rotary embedding needs an even number of at least 4"),
        ({"head_dim": 2}, "head_dim is 2;"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan;"),
        ({"hidden_act": 3}, "hidden_act is 3; it must be a text"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false"),
        ({"mlp_bias": True}, "mlp_bias is true; biases in the feed-forward block are not supported"),
        ({"eos_token_id": -1}, "eos_token_id is -1; it must be a token id or a list of them"),
        ({"eos_token_id": ["a"]}, "eos_token_id is ['a'];"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    assert message_of(**fields).startswith("config.json: " + message)


@pytest.mark.parametrize(
    ("fields", "kind", "theta", "parameters", "max_positions"),
    [
        ({}, "default", 10000.0, {}, 1024),
        ({"rope_theta": 5e5, "rope_scaling": None}, "default", 5e5, {}, 1024),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "default", 5e5, {}, 1024),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, "linear", 1e4, {"factor": 2.5}, 2560),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4}},
            "dynamic",
            1e4,
            {"factor": 4, "original_max_position_embeddings": 1024},
            4096,
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            "llama3",
            5e5,
            {name: value for name, value in LLAMA3.items() if name != "rope_type"},
            1024,
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn", 1e4, {"factor": 4.0}, 1024),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                }
            },
            "yarn",
            1e6,
            {"factor": 4.0, "original_max_position_embeddings": 1024},
            4096,
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 256,
                    "beta_fast": 32,
                    "mscale": 0.7,
                    "attention_factor": None,
                    "truncate": False,
                }
            },
            "yarn",
            1e4,
            {"factor": 2.0, "original_max_position_embeddings": 256, "beta_fast": 32, "mscale": 0.7, "truncate": False},
            1024,
        ),
    ],
)
def test_rope_is_read_from_both_styles_of_config(
    fields: dict[str, Any], kind: str, theta: float, parameters: dict[str, Any], max_positions: int
) -> None:
    spec = spec_of(**fields)
    assert (spec.rope.kind, spec.rope.theta, spec.rope.parameters) == (kind, theta, parameters)
    assert spec.max_positions == max_positions


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope"}, "RoPE kind 'longrope' is not supported; known are default, linear, dynamic, llama3, yarn"),
        ({"type": "linear"}, "factor is missing"),
        ({"type": "linear", "factor": 0.5}, "factor is 0.5; it must be between 1 and 65536"),
        ({"type": "dynamic", "factor": "2"}, "factor is '2'; it must be a number above 0"),
        ({"rope_type": "yarn", "beta_fast": 1}, "factor is missing"),
        ({"rope_type": "yarn", "factor": 2, "beta_fast": 1}, "beta_slow is 1 and beta_fast is 1; the first must be smaller"),
        ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}, "original_max_position_embeddings is 0;"),
        (LLAMA3 | {"low_freq_factor": None}, "low_freq_factor is missing"),
        (LLAMA3 | {"original_max_position_embeddings": None}, "original_max_position_embeddings is missing"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor is 1 and high_freq_factor is 1; the first must be smaller"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta is 0; it must be a number above 1"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; only 1 is supported"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "'mrope_section' is [1, 2]; it must be a number, true or false"),
    ],
)
def test_rope_that_cannot_be_run_is_refused_in_one_line(scaling: dict[str, Any], message: str) -> None:
    assert message_of(rope_scaling=scaling).startswith("config.json: rope_scaling: " + message)


def test_rope_scaling_that_is_no_object_is_refused() -> None:
    assert message_of(rope_scaling="yarn") == "config.json: rope_scaling is 'yarn'; it must be an object"


QWEN: dict[str, Any] = {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 128}


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 128}, (None, None, None)),
        ({"model_type": "mistral", "num_key_value_heads": 2}, (4096, 4096, 4096)),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 128}, (128, 128, 128)),
        ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}, (None, None, None)),
        (QWEN | {"max_window_layers": 1}, (None, None, None)),
        (QWEN | {"max_window_layers": 1, "use_sliding_window": True}, (None, 128, 128)),
        (QWEN | {"use_sliding_window": True}, (None, None, None)),
        (
            QWEN | {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            (128, None, 128),
        ),
        (QWEN | {"model_type": "qwen3", "max_window_layers": 0, "use_sliding_window": True}, (128, 128, 128)),
        (QWEN | {"max_window_layers": 0, "use_sliding_window": True, "sliding_window": None}, (None, None, None)),
    ],
)
def test_sliding_windows_are_on_the_layers_that_transformers_puts_them_on(
    fields: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert spec_of(**fields).layer_windows == windows


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["full_attention"], "layer_types is ['full_attention']; it must be a list of 3, one a layer"),
        (["full_attention", "linear_attention", "full_attention"], "layer_types of layer 1 is 'linear_attention'; known are"),
    ],
)
def test_layer_types_that_do_not_fit_are_refused(types: list[str], message: str) -> None:
    assert message_of(**QWEN, use_sliding_window=True, layer_types=types).startswith("config.json: " + message)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        ({}, None, (2,)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": 7}, {"eos_token_id": [8, 7]}, (8, 7)),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 9}, (9, 5, 6)),
        ({}, {"eos_token_id": 9}, (9,)),
    ],
)
def test_end_tokens_are_those_of_both_files(
    in_config: dict[str, Any], in_generation: dict[str, Any] | None, expected: tuple[int, ...]
) -> None:
    assert spec_of(in_generation, **in_config).eos_token_ids == expected


def test_an_absurd_end_token_of_generation_config_is_told_of_that_file() -> None:
    assert message_of({"eos_token_id": 1.5}).startswith("generation_config.json: eos_token_id is 1.5;")


def test_every_tensor_of_a_spec_has_one_name_and_one_shape() -> None:
    spec = spec_of(model_type="qwen3", num_key_value_heads=2, num_hidden_layers=1, attention_bias=True)
    names = tensor_names(spec)
    assert list(names.values()) == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert tensor_shapes(spec).keys() == names.keys()
    assert tensor_shapes(spec)[0, "down"] == (64, 96)


def test_a_tied_head_has_no_name() -> None:
    assert (None, "head") not in tensor_names(spec_of(tie_word_embeddings=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LLAMA3, "tie_word_embeddings": True, "attention_bias": True, "eos_token_id": [3, 4]},
        {"rope_scaling": {"type": "linear", "factor": 1.3}, "bos_token_id": None, "eos_token_id": None},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 32},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "truncate": False}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 128},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        QWEN | {"use_sliding_window": True, "max_window_layers": 1},
        {"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True, "hidden_act": "gelu"},
    ],
)
def test_a_written_config_is_read_back_as_the_same_spec(fields: dict[str, Any]) -> None:
    spec = spec_of(**fields)
    assert model_spec(config_json(spec, "F32"), generation_json(spec), name="m") == spec
