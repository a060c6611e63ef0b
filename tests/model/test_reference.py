"""The forward against the models of transformers: the same random weights, the same logits, the same answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from offload_sirius.model.dense import DenseSource
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius_loaders.checkpoint import Key
from offload_sirius_loaders.spec import ModelSpec, Role, RopeSpec

MAX_DIFFERENCE = 1e-4
PROMPT_LENGTHS = (1, 17, 600)
CAPACITY = 640
VOCAB_SIZE = 131

ROLES: dict[str, Role] = {
    "input_layernorm.weight": "input_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.o_proj.bias": "o_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "post_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
MODEL_ROLES: dict[str, Role] = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table: a configuration of transformers, and what of it a ModelSpec cannot read off its fields."""

    config: Any
    rope: RopeSpec = field(default_factory=RopeSpec)
    windows: tuple[int | None, ...] = (None, None, None)
    qkv_bias: bool = False
    output_bias: bool = False

    def spec(self) -> ModelSpec:
        config = self.config
        factor = self.rope.parameters.get("factor", 1) if self.rope.kind in ("linear", "dynamic") else 1
        return ModelSpec(
            name=config.model_type,
            architecture=config.model_type,
            num_layers=config.num_hidden_layers,
            width=config.hidden_size,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            ffn_width=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_positions=round(config.max_position_embeddings * factor),
            norm_eps=config.rms_norm_eps,
            rope=self.rope,
            activation=config.hidden_act,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm=config.model_type == "qwen3",
            tied_head=config.tie_word_embeddings,
            layer_windows=self.windows,
        )


SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**(SHAPE | fields))


def scaled_llama(kind: Any, max_positions: int, **parameters: float | bool) -> Case:
    """llama with scaled rotary positions."""
    config = llama(max_position_embeddings=max_positions, rope_parameters={"rope_type": kind, "rope_theta": 5000.0, **parameters})
    return Case(config=config, rope=RopeSpec(kind=kind, theta=5000.0, parameters=parameters))


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}

CASES = {
    "llama, as many kv heads as heads": Case(config=llama(num_key_value_heads=4)),
    "llama, grouped heads": Case(config=llama()),
    "llama, one kv head": Case(config=llama(num_key_value_heads=1)),
    "llama, heads wider than width / heads": Case(config=llama(head_dim=24)),
    "llama, head tied to the embedding": Case(config=llama(tie_word_embeddings=True)),
    "llama, biases": Case(config=llama(attention_bias=True), qkv_bias=True, output_bias=True),
    "llama, gelu": Case(config=llama(hidden_act="gelu")),
    "llama, other theta and eps": Case(config=llama(rope_theta=1e6, rms_norm_eps=1e-3), rope=RopeSpec(theta=1e6)),
    "mistral, window shorter than the prompt": Case(config=MistralConfig(**SHAPE, sliding_window=9), windows=(9, 9, 9)),
    "mistral, no window": Case(config=MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": Case(config=Qwen2Config(**SHAPE), qkv_bias=True),
    "qwen2, window in the upper layers": Case(
        config=Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=12, max_window_layers=1),
        windows=(None, 12, 12),
        qkv_bias=True,
    ),
    "qwen3, wide heads": Case(config=Qwen3Config(**SHAPE, head_dim=24)),
    "qwen3, biases and tied": Case(
        config=Qwen3Config(**(SHAPE | {"tie_word_embeddings": True}), head_dim=16, attention_bias=True),
        qkv_bias=True,
        output_bias=True,
    ),
    "linear": scaled_llama("linear", 256, factor=2.5),
    "dynamic": scaled_llama("dynamic", 128, factor=8.0),
    "dynamic, border crossed while decoding": scaled_llama("dynamic", 20, factor=32.0),
    "llama3": scaled_llama("llama3", 1024, **LLAMA3),
    "yarn": scaled_llama("yarn", 1024, **YARN),
    "yarn, mscale": scaled_llama("yarn", 1024, **YARN, mscale=0.8, mscale_all_dim=0.4),
    "yarn, attention factor and betas": scaled_llama("yarn", 1024, **YARN, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0),
    "yarn, not truncated": scaled_llama("yarn", 1024, **YARN, truncate=False),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reference(case: Case) -> PreTrainedModel:
    """A model of transformers in which nothing is left at zero or one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(case.config, dtype=torch.float32, attn_implementation="eager").eval()
    for parameter in model.parameters():
        spread = 1.5 / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.3
        parameter.data = torch.randn_like(parameter) * spread + (parameter.ndim == 1)
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def source(case: Case, reference: PreTrainedModel) -> DenseSource:
    return DenseSource(case.spec(), dict(named_by_role(reference)))


@pytest.fixture
def transformer(case: Case, source: DenseSource) -> Transformer:
    return Transformer(case.spec(), source, KVCache(case.spec(), CAPACITY, dtype=torch.float32), chunk_size=256)


def named_by_role(model: PreTrainedModel) -> Iterator[tuple[Key, Tensor]]:
    for name, tensor in model.state_dict().items():
        if name in MODEL_ROLES:
            yield (None, MODEL_ROLES[name]), tensor
        else:
            layer, rest = name.removeprefix("model.layers.").split(".", 1)
            yield (int(layer), ROLES[rest]), tensor


def tokens(count: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(count))


def greedy_answer(model: PreTrainedModel, prompt: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
    """What transformers answers: token ids [num_new], and the logits each was chosen from [num_new, V]."""
    output = model.generate(
        prompt[None],
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return output.sequences[0, len(prompt) :], torch.cat(output.logits)


@pytest.mark.parametrize("num_prompt", PROMPT_LENGTHS)
def test_logits_are_those_of_transformers(reference: PreTrainedModel, transformer: Transformer, num_prompt: int) -> None:
    prompt = tokens(num_prompt)
    answer, expected = greedy_answer(reference, prompt, 13)

    logits = [transformer.prefill(prompt)[None]]
    logits += [transformer.step(part) for part in answer[:-1].split([1, 1, 7, 1, 2])]

    assert (torch.cat(logits) - expected).abs().max() <= MAX_DIFFERENCE


def test_greedy_answer_is_that_of_transformers(reference: PreTrainedModel, transformer: Transformer) -> None:
    prompt = tokens(17)

    answer = [transformer.prefill(prompt).argmax()]
    while len(answer) < 20:
        answer.append(transformer.step(answer[-1].view(1))[0].argmax())

    assert torch.stack(answer).tolist() == greedy_answer(reference, prompt, 20)[0].tolist()
