"""Quantised checkpoints, from their files to the answer: the same as of the numbers that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine.placement import place
from offload_sirius_loaders import open_checkpoint

from ..loaders.quantised import WAYS, write_pair
from .conftest import CONTEXT, FULL, Load

DRAFTED = DecodingConfig(mode="sirius", draft="streamed")
PROMPT = [1, 5, 9, 33, 2]
ANSWER: dict[str, Any] = {"max_new_tokens": 16, "ignore_eos": True, "temperature": 1.0}
EACH_FORMAT = [
    "awq",
    "gptq, asymmetric",
    "gptq, any order",
    "int4 groups with zero points",
    "int8",
    "fp8 tensors",
    "fp8 blocks",
]


def with_tokenizer(folder: Path) -> str:
    words = {f"w{token_id}": token_id for token_id in range(64)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return str(folder)


def from_disk(model: str, decoding: DecodingConfig = FULL) -> dict[str, str]:
    """Budgets, to the byte, with which all layers are streamed from disk."""
    config = EngineConfig(model=model, device="cpu", max_context=CONTEXT, dtype="float32", decoding=decoding)
    placement = place(open_checkpoint(model), config)
    plan = placement.plan
    return {
        "device_memory": str(plan.device_nbytes - plan.device_bill["resident_layers"] + 2 * plan.layer_nbytes),
        "host_memory": str(placement.planned.demand.reading.nbytes(2) + plan.host_bill["embedding"]),
    }


@pytest.mark.parametrize("way", EACH_FORMAT)
def test_the_answer_is_that_of_the_plain_numbers(way: str, load: Load, tmp_path: Path) -> None:
    quantised, dense = (with_tokenizer(folder) for folder in write_pair(WAYS[way], tmp_path))
    expected = load(dense, dtype="float32").generate(PROMPT, **ANSWER).token_ids
    assert len(set(expected)) > 3
    assert load(quantised, dtype="float32").generate(PROMPT, **ANSWER).token_ids == expected
    streamed = load(quantised, dtype="float32", **from_disk(quantised))
    assert len(streamed.plan.disk_layers) == 3
    assert streamed.generate(PROMPT, **ANSWER).token_ids == expected
    drafted = load(quantised, dtype="float32", mode="sirius", **from_disk(quantised, DRAFTED))
    assert drafted.generate(PROMPT, **ANSWER).token_ids == expected
    hot = load(quantised, dtype="float32", mode="sirius", draft="resident", keep=0.5, window=4)
    assert hot.plan.hot is not None
    for _ in range(2):  # the second knows what the first has taught
        assert hot.generate(PROMPT, **ANSWER).token_ids == expected


def test_by_default_they_are_computed_in_bfloat16(load: Load, tmp_path: Path) -> None:
    quantised, dense = (with_tokenizer(folder) for folder in write_pair(WAYS["awq"], tmp_path))
    assert place(open_checkpoint(quantised), EngineConfig(model=quantised, device="cpu")).dtype == torch.bfloat16
    expected = load(dense, dtype="bfloat16").generate(PROMPT, **ANSWER)
    assert load(quantised).generate(PROMPT, **ANSWER).token_ids == expected.token_ids
