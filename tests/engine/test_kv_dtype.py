"""Keys and values in 8 bits, in an engine: within the plan, exact beside mode full with the same cache, close to plain ones."""

from __future__ import annotations

from typing import Any

import pytest

from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine.placement import place
from offload_sirius.errors import ConfigError
from offload_sirius.model.costs import quantized_kv_cache_nbytes
from offload_sirius_loaders import open_checkpoint

from .conftest import CONTEXT, TINY, Load

INT8: dict[str, Any] = {"kv_dtype": "int8"}
PROMPT = list(b"hello world")
ASKED: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True}
HOT = DecodingConfig(draft="resident", keep=0.3, window=4)
DRAFTS: dict[str, dict[str, Any]] = {
    "lines": {"draft": "streamed", "keep": 0.3, "window": 4},
    "trees": {"draft": "streamed", "keep": 0.3, "window": 4, "tree_width": 3},
    "by token": {"draft": "streamed", "sparsity": "cats", "keep": 0.3, "window": 5},
    "resident": {"draft": "resident", "keep": 0.3, "window": 4},
}


@pytest.mark.parametrize("drafts", DRAFTS.values(), ids=list(DRAFTS))
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.1, "seed": 4}], ids=["greedy", "sampled"])
def test_corrected_drafts_give_what_mode_full_gives(drafts: dict[str, Any], sampled: dict[str, Any], load: Load) -> None:
    plain, drafting = load(**INT8), load(mode="sirius", **drafts, **INT8)
    expected = plain.generate(PROMPT, **ASKED, **sampled)
    found = drafting.generate(PROMPT, **ASKED, **sampled)
    assert found.token_ids == expected.token_ids
    assert found.windows > 0
    # A second turn goes on in the cache.
    prompt = [*PROMPT, *expected.token_ids[:6], 7, 8]
    again = drafting.generate(prompt, **ASKED | {"max_new_tokens": 8}, **sampled)
    assert again.token_ids == plain.generate(prompt, **ASKED | {"max_new_tokens": 8}, **sampled).token_ids
    assert again.cached_tokens >= len(PROMPT) + 6


def test_answers_that_are_written_together_are_those_that_are_written_alone(load: Load) -> None:
    prompts = [PROMPT, [*PROMPT, 7], list(b"good bye")]
    alone, together = load(**INT8), load(mode="sirius", **DRAFTS["lines"], **INT8, parallel=2)
    batch = together.batch()
    answers = [batch.submit(prompt, **ASKED) for prompt in prompts]
    while batch.step():
        pass
    assert [answer.result.token_ids for answer in answers] == [alone.generate(prompt, **ASKED).token_ids for prompt in prompts]


def test_what_the_model_says_is_nearly_what_it_says_with_plain_ones(load: Load) -> None:
    continuation = list(b", and good bye")
    (plain,), (near,) = (load(**given).score(PROMPT, [continuation]) for given in ({}, INT8))
    differences = [abs(a.log_probability - b.log_probability) for a, b in zip(plain, near, strict=True)]
    assert 0 < max(differences) < 0.05


def test_the_plan_counts_them_and_the_device_holds_no_more(load: Load) -> None:
    for decoding in (DecodingConfig(mode="full"), HOT):
        config = EngineConfig(model=TINY, device="cpu", max_context=CONTEXT, decoding=decoding, kv_dtype="int8")
        bill = place(open_checkpoint(TINY), config).plan.device_bill
        assert bill["kv_cache"] == quantized_kv_cache_nbytes(open_checkpoint(TINY).spec, 1, CONTEXT)
        engine = load(**INT8, mode=decoding.mode, draft=decoding.draft, decoding=decoding)
        memory = engine.generate(PROMPT, **ASKED).memory
        assert engine._transformer.cache.nbytes == bill["kv_cache"]
        assert 0 < memory.device_peak_bytes <= memory.device_plan_bytes


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^--kv-dtype is int4; it must be one of auto, int8$"):
        EngineConfig(kv_dtype="int4")  # type: ignore[arg-type]
