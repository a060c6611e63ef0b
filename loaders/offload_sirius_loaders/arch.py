"""Hugging Face's config.json to and from ModelSpec, and the names of a model's tensors: llama, mistral, qwen2, qwen3.

A field that a file leaves out has the value that the transformers config class of its architecture gives it. Knows nothing of
tensor files; GGUF metadata is read beside GGUF files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from offload_sirius_loaders.checkpoint import Element, Key
from offload_sirius_loaders.json_object import MAX_COUNT, JsonObject
from offload_sirius_loaders.rope_scaling import read_rope, rope_fields, stretched_positions
from offload_sirius_loaders.shown import short
from offload_sirius_loaders.spec import ModelSpec, Role

MAX_LAYERS = 65536
"""Most layers believed: a spec holds an entry a layer."""
DEFAULT_WINDOW = 4096
"""sliding_window where a file has none and its architecture has windows; null means none."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one architecture has, and what its config class fills in where config.json is silent."""

    class_name: str
    """The transformers class, for the `architectures` entry."""
    num_kv_heads: int | None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: hidden_size // num_attention_heads."""
    qkv_bias: bool | None = False
    """None: as attention_bias says."""
    output_bias: bool | None = False
    """None: as attention_bias says."""
    qk_norm: bool = False
    windows: Literal["none", "every layer", "by layer"] = "none"
    """Which layers may have a sliding window; `by layer` needs use_sliding_window besides."""
    bos_token_id: int | None = None
    eos_token_id: int | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(
        class_name="LlamaForCausalLM",
        num_kv_heads=None,
        qkv_bias=None,
        output_bias=None,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "mistral": Family(
        class_name="MistralForCausalLM",
        num_kv_heads=8,
        windows="every layer",
        bos_token_id=1,
        eos_token_id=2,
    ),
    "qwen2": Family(
        class_name="Qwen2ForCausalLM",
        num_kv_heads=32,
        qkv_bias=True,
        windows="by layer",
    ),
    "qwen3": Family(
        class_name="Qwen3ForCausalLM",
        num_kv_heads=32,
        head_dim=128,
        qkv_bias=None,
        output_bias=None,
        qk_norm=True,
        windows="by layer",
    ),
}
"""model_type -> family."""

_MODEL_NAMES: dict[Role, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
_LAYER_NAMES: dict[Role, str] = {
    "input_norm": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "post_norm": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_DTYPE_OF_ELEMENT: dict[Element, str] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def tensor_names(spec: ModelSpec) -> dict[Key, str]:
    """(layer, role) -> name, for exactly the tensors that the spec has, in the order in which a pass uses them."""
    names: dict[Key, str] = {(None, "embedding"): _MODEL_NAMES["embedding"]}
    for layer in range(spec.num_layers):
        names |= {(layer, role): f"model.layers.{layer}.{_LAYER_NAMES[role]}" for role in spec.layer_roles()}
    return names | {(None, role): _MODEL_NAMES[role] for role in spec.model_roles() if role != "embedding"}


def tensor_shapes(spec: ModelSpec) -> dict[Key, tuple[int, ...]]:
    """(layer, role) -> shape, for exactly the tensors that the spec has; matrices are [out, in]."""
    shapes: dict[Key, tuple[int, ...]] = {(None, role): shape for role, shape in spec.model_roles().items()}
    for layer in range(spec.num_layers):
        shapes |= {(layer, role): shape for role, shape in spec.layer_roles().items()}
    return shapes


def model_spec(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None, *, name: str, source: str = "config.json"
) -> ModelSpec:
    """Read config.json and generation_config.json (None: the model has none); `source` is what messages call the former.

    `stored_dtype` is left at its default, because config.json does not know what the files hold. Raises CheckpointError for an
    unknown architecture, an absent or absurd field, and what the architecture can but this package cannot.
    """
    fields = JsonObject(source, config)
    family = _family(fields)
    _refuse_unsupported(fields)
    attention_bias = fields.flag("attention_bias")
    num_layers = fields.count("num_hidden_layers", most=MAX_LAYERS)
    num_heads = fields.count("num_attention_heads")
    rope = read_rope(fields)
    return ModelSpec(
        name=name,
        architecture=config["model_type"],
        num_layers=num_layers,
        width=fields.count("hidden_size"),
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(fields, family, num_heads),
        head_dim=_head_dim(fields, family, num_heads),
        ffn_width=fields.count("intermediate_size"),
        vocab_size=fields.count("vocab_size"),
        max_positions=stretched_positions(rope, fields.count("max_position_embeddings")),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        activation=fields.text("hidden_act", "silu"),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        qk_norm=family.qk_norm,
        tied_head=fields.flag("tie_word_embeddings"),
        layer_windows=_layer_windows(fields, family, num_layers),
        bos_token_id=next(iter(_token_ids(fields, generation_config, "bos_token_id", family.bos_token_id)), None),
        eos_token_ids=_token_ids(fields, generation_config, "eos_token_id", family.eos_token_id),
    )


def config_json(spec: ModelSpec, element: Element) -> dict[str, Any]:
    """The config.json of a model whose tensors are stored as `element`: model_spec reads it back, and so does transformers."""
    family = FAMILIES[spec.architecture]
    return {
        "architectures": [family.class_name],
        "model_type": spec.architecture,
        "torch_dtype": _DTYPE_OF_ELEMENT[element],
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.width,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn_width,
        "vocab_size": spec.vocab_size,
        "hidden_act": spec.activation,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_head,
        "attention_bias": spec.output_bias,
        **rope_fields(spec.rope, spec.max_positions),
        **_window_fields(spec, family),
        **generation_json(spec),
    }


def generation_json(spec: ModelSpec) -> dict[str, Any]:
    """The generation_config.json of a model: where a text begins and ends."""
    return {"bos_token_id": spec.bos_token_id, "eos_token_id": list(spec.eos_token_ids) or None}


def _family(fields: JsonObject) -> Family:
    model_type = fields.text("model_type")
    if model_type not in FAMILIES:
        raise fields.error(f"architecture {short(model_type)} is not supported; known are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def _refuse_unsupported(fields: JsonObject) -> None:
    if fields.flag("mlp_bias"):
        raise fields.error("mlp_bias is true; biases in the feed-forward block are not supported, use a model without them")


def _num_kv_heads(fields: JsonObject, family: Family, num_heads: int) -> int:
    # Absent is not the same as null here: absent takes the class's default, null means one each.
    absent = "num_key_value_heads" not in fields.fields
    num_kv_heads = fields.count("num_key_value_heads", (family.num_kv_heads if absent else None) or num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            f"num_attention_heads is {num_heads} and num_key_value_heads is {num_kv_heads}; "
            "the first must be a multiple of the second"
        )
    return num_kv_heads


def _head_dim(fields: JsonObject, family: Family, num_heads: int) -> int:
    width = fields.count("hidden_size")
    given = fields.has("head_dim") or family.head_dim is not None
    if not given and width % num_heads:
        raise fields.error(
            f"hidden_size is {width} and num_attention_heads is {num_heads}; the first must be a multiple of the second"
        )
    head_dim = fields.count("head_dim", family.head_dim or width // num_heads, most=2**16)
    if head_dim % 2 or head_dim < 4:
        raise fields.error(f"head_dim is {head_dim}; rotary embedding needs an even number of at least 4")
    return head_dim


def _layer_windows(fields: JsonObject, family: Family, num_layers: int) -> tuple[int | None, ...]:
    """Sliding window of each layer.

    A window of W is counted as transformers counts it: the position itself and the W - 1 before it (its mask keeps
    key > query - W). mistral: on all layers, 4096 where the field is absent, none where it is null. qwen2 and qwen3: only with
    use_sliding_window, on the layers that `layer_types` calls sliding_attention or, without it, from max_window_layers up.
    """
    if family.windows == "none" or (family.windows == "by layer" and not fields.flag("use_sliding_window")):
        return (None,) * num_layers
    if fields.fields.get("sliding_window", DEFAULT_WINDOW) is None:
        return (None,) * num_layers
    window = fields.count("sliding_window", DEFAULT_WINDOW)
    if family.windows == "every layer":
        return (window,) * num_layers
    return tuple(window if slides else None for slides in _sliding_layers(fields, num_layers))


def _sliding_layers(fields: JsonObject, num_layers: int) -> list[bool]:
    if not fields.has("layer_types"):
        first = fields.count("max_window_layers", 28, least=0)
        return [layer >= first for layer in range(num_layers)]
    types = fields.fields["layer_types"]
    if not isinstance(types, list) or len(types) != num_layers:
        raise fields.error(f"layer_types is {short(types)}; it must be a list of {num_layers}, one a layer")
    for layer, layer_type in enumerate(types):
        if layer_type not in ("full_attention", "sliding_attention"):
            raise fields.error(
                f"layer_types of layer {layer} is {short(layer_type)}; known are full_attention and sliding_attention"
            )
    return [layer_type == "sliding_attention" for layer_type in types]


def _window_fields(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """The fields that _layer_windows reads back. The file has room for one window: which one is the caller's to check."""
    window = next((each for each in spec.layer_windows if each is not None), None)
    if family.windows == "none":
        return {}
    if family.windows == "every layer":
        return {"sliding_window": window}
    types = ["full_attention" if each is None else "sliding_attention" for each in spec.layer_windows]
    return {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": types}


def _token_ids(
    fields: JsonObject, generation_config: Mapping[str, Any] | None, name: str, default: int | None
) -> tuple[int, ...]:
    """The ids of both files, generation_config.json's first; the class's default where neither has the field."""
    generation = JsonObject("generation_config.json", generation_config or {})
    ids = [*_listed_ids(generation, name), *_listed_ids(fields, name)]
    if not ids and default is not None and name not in fields.fields:
        return (default,)
    return tuple(dict.fromkeys(ids))


def _listed_ids(fields: JsonObject, name: str) -> list[int]:
    value = fields.fields.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id <= MAX_COUNT:
            raise fields.error(f"{name} is {short(value)}; it must be a token id or a list of them")
    return ids
