"""Sparse really is the papers' sparse, and a threshold is the paper's correction: token for token what masked models of
transformers answer, of random weights everywhere the layers can be, and of real ones. float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import open_model
from offload_sirius.engine.placement import place
from offload_sirius.weights.plan import MIN_READERS

from .masked_llama import Rule, SparseReference

# Older versions of transformers know no other name.
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values.:FutureWarning")

RULES: tuple[Rule, ...] = ("griffin", "cats")
KEEPS = (0.3, 0.5, 0.75)
NUM_NEW = 48
CONTEXT = 80
VOCAB_SIZE = 211
PROMPT = torch.randint(0, VOCAB_SIZE, (19,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of random weights, none at zero or one, with answers that do not repeat themselves."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=144,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        spread = 1.5 / parameter.shape[1] ** 0.5 if parameter.ndim == 2 else 0.3
        parameter.data = torch.randn_like(parameter) * spread + (parameter.ndim == 1)
    return model


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That model, saved, with a tokenizer that nobody asks."""
    directory: Path = tmp_path_factory.mktemp("reference") / "llama"
    model.save_pretrained(directory)
    words = {f"w{token_id}": token_id for token_id in range(VOCAB_SIZE)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(directory / "tokenizer.json"))
    return directory


def places(folder: Path, decoding: DecodingConfig) -> Iterator[dict[str, Any]]:
    """Settings with which everything is resident, comes over an emulated link, from disk, and from disk but for kept neurons."""
    config = EngineConfig(model=str(folder), device="cpu", dtype="float32", max_context=CONTEXT, decoding=decoding)
    placement = place(open_model(str(folder)).checkpoint, config)
    plan = placement.plan
    two_slots = str(plan.device_nbytes - plan.device_bill["resident_layers"] + 2 * plan.layer_nbytes)
    reading = placement.planned.demand.reading.nbytes(MIN_READERS)
    yield {}
    yield {"device_memory": two_slots, "link_gbps": 2.0}
    yield {"device_memory": two_slots, "host_memory": str(reading)}
    if decoding.sparsity == "griffin":
        yield {"device_memory": two_slots, "host_memory": str(reading + 4 * placement.layout.kept_host_nbytes)}


def answer(folder: Path, prompt: list[int], decoding: DecodingConfig, num_new: int, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "max_context": CONTEXT,
        "decoding": decoding,
    } | settings
    with offload_sirius.load(str(folder), **given) as engine:
        return engine.generate(prompt, max_new_tokens=num_new, ignore_eos=True)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("rule", RULES)
def test_sparse_answers_are_those_of_a_masked_model_wherever_the_layers_are(
    rule: Rule, keep: float, model: Any, folder: Path
) -> None:
    expected = SparseReference(model, rule, keep).sparse_answer(PROMPT, NUM_NEW)
    decoding = DecodingConfig(mode="sparse", sparsity=rule, keep=keep, draft="streamed")
    for settings in places(folder, decoding):
        found = answer(folder, PROMPT, decoding, NUM_NEW, **settings)
        assert list(found.token_ids) == expected
        assert found.passes.draft == NUM_NEW - 1


@pytest.mark.parametrize("rule", RULES)
def test_sparse_models_differ_from_each_other_and_from_the_dense_one(rule: Rule, model: Any) -> None:
    answers = [SparseReference(model, rule, keep).sparse_answer(PROMPT, NUM_NEW) for keep in (*KEEPS, 1)]
    assert len({tuple(each) for each in answers}) == 4


@pytest.mark.parametrize("threshold", [0.1, 0.02])
@pytest.mark.parametrize("window", [2, 5, 16])
@pytest.mark.parametrize("rule", RULES)
def test_a_threshold_accepts_what_the_paper_accepts(rule: Rule, window: int, threshold: float, model: Any, folder: Path) -> None:
    reference = SparseReference(model, rule, 0.75)
    expected, aal = reference.corrected_answer(PROMPT, NUM_NEW, window, threshold)
    drafting = DecodingConfig(mode="sirius", sparsity=rule, keep=0.75, draft="streamed")
    decoding = replace(drafting, window=window, accept="threshold", threshold=threshold)
    for settings in list(places(folder, decoding))[:2]:
        found = answer(folder, PROMPT, decoding, NUM_NEW, **settings)
        assert list(found.token_ids) == expected
        assert found.aal == pytest.approx(aal)


@pytest.mark.parametrize("rule", RULES)
def test_a_threshold_is_not_exact(rule: Rule, model: Any) -> None:
    """Or the tests above would show no more than those of exact acceptance."""
    full = SparseReference(model, rule, 1).sparse_answer(PROMPT, NUM_NEW)
    reference = SparseReference(model, rule, 0.75)
    lossy, aal = reference.corrected_answer(PROMPT, NUM_NEW, 16, 0.02)
    assert lossy != full
    assert 1 < aal < 16


@pytest.fixture(scope="module")
def real_model(smollm2_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def real_prompt(smollm2_gguf: Path) -> list[int]:
    return open_model(str(smollm2_gguf)).encode("Why is the sky blue?")


@pytest.mark.parametrize(
    ("rule", "keep", "num_new"),
    [("griffin", 0.5, NUM_NEW), ("cats", 0.5, NUM_NEW), *((rule, keep, 8) for rule in RULES for keep in (0.3, 0.75))],
)
def test_sparse_answers_of_real_weights_are_those_of_a_masked_model(
    rule: Rule, keep: float, num_new: int, real_model: Any, smollm2_folder: Path, real_prompt: list[int]
) -> None:
    expected = SparseReference(real_model, rule, keep).sparse_answer(real_prompt, num_new)
    decoding = DecodingConfig(mode="sparse", sparsity=rule, keep=keep, draft="streamed")
    found = answer(smollm2_folder, real_prompt, decoding, num_new, max_context=128)
    assert list(found.token_ids) == expected
