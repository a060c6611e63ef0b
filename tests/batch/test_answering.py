"""Prompts answered together: as many at once as there are places, and each ends in an answer or in why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import offload_sirius
from offload_sirius.batch.answering import answer_all, answerable, fastest_parallel
from offload_sirius.batch.lines import Line
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig
from offload_sirius.engine import open_model
from offload_sirius.engine.placement import place
from offload_sirius.errors import BudgetError, WeightReadError

TINY = "synthetic:tiny?dtype=F32"
FULL = DecodingConfig(mode="full")
PROMPTS = ["hello", "what do you say", "the tokens of a tiny model", "good bye", "hello there"]


def lines(prompts: list[str] = PROMPTS, **settings: Any) -> list[tuple[int, Line]]:
    config = GenerationConfig(**{"max_new_tokens": 6} | settings)
    return [(i, Line(number=i + 1, id=i + 1, prompt=text, config=config)) for i, text in enumerate(prompts)]


@pytest.mark.parametrize("parallel", [1, 3])
def test_each_answer_is_the_one_that_its_prompt_has_alone(parallel: int) -> None:
    answers = dict[int, dict[str, Any]]()
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=48, parallel=parallel) as engine:
        answer_all(engine.batch(), lines(), answers.__setitem__, figures=False)
        for index, line in lines():
            alone = engine.generate(line.prompt, line.config, reuse=False)
            num_prompt = alone.prompt_tokens
            assert answers[index] == {
                "id": line.id,
                "text": alone.text,
                "token_ids": list(alone.token_ids),
                "finish_reason": "length",
                "usage": {"prompt_tokens": num_prompt, "completion_tokens": 6, "total_tokens": num_prompt + 6},
            }
        answer_all(engine.batch(), lines()[:1], answers.__setitem__, figures=True)
    figures = answers[0]["figures"]
    assert figures["passes"]["full"] > 0
    assert not {"text", "plan", "settings"} & set(figures)


def test_a_prompt_that_the_engine_refuses_does_not_stop_the_others() -> None:
    answers = dict[int, dict[str, Any]]()
    places = [*lines(["x" * 60]), (1, lines(["hi"])[0][1])]
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=48) as engine:
        answer_all(engine.batch(), places, answers.__setitem__, figures=False)
    assert answers[0]["error"].startswith("prompt and answer take ")
    assert len(answers[1]["token_ids"]) == 6


def test_weights_that_cannot_be_read_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = dict[int, dict[str, Any]]()
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=48, parallel=2) as engine:
        batch, step, count = engine.batch(), engine.batch().step, 0

        def failing() -> bool:
            nonlocal count
            count += 1
            if count == 9:
                raise WeightReadError("the disk is gone")
            return step.__func__(batch)  # type: ignore[attr-defined, no-any-return]

        monkeypatch.setattr(batch, "step", failing)
        with pytest.raises(WeightReadError, match="the disk is gone"):
            answer_all(batch, lines(), answers.__setitem__, figures=False)
    assert set(answers) == {0, 1}


def test_prompts_too_long_are_known_before_anything_is_loaded() -> None:
    model = open_model("synthetic:tiny?dtype=F32&positions=16")
    able, errors, needed = answerable(model, lines(["hi", "x" * 40, "hello"]), None)
    assert [index for index, _ in able] == [0, 2]
    assert errors[1].startswith("the prompt has 4")
    assert needed == len(model.encode("hello")) + 6
    able, errors, _ = answerable(model, lines(["hi", "hello hello"]), 10)
    assert [index for index, _ in able] == [0]
    assert errors[1].endswith("10 were planned for; shorten them, or load with a larger --max-context")


def test_as_many_at_once_are_chosen_as_there_are_prompts_and_memory_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path))
    model = open_model(TINY)
    config = EngineConfig(model=TINY, device="cpu", max_context=48, decoding=FULL, link_gbps=0.01, device_memory="64MiB")
    assert fastest_parallel(model, config, 5) == 5
    tight = EngineConfig(model=TINY, device="cpu", max_context=48, decoding=FULL, link_gbps=0.01, device_memory="900KiB")
    chosen = fastest_parallel(model, tight, 64)
    assert 1 < chosen < 64
    smallest = place(model.checkpoint, tight).plan.device_nbytes
    assert smallest <= 900 << 10
    with pytest.raises(BudgetError):
        fastest_parallel(model, EngineConfig(model=TINY, device="cpu", max_context=48, device_memory="1KiB"), 4)
