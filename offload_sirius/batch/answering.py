"""The prompts of a batch, answered together, as many at once as the engine has places for. Knows no files."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, Protocol

from offload_sirius.batch.lines import Id, Line
from offload_sirius.config import MAX_PARALLEL, EngineConfig, GenerationConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Model, Prompt
from offload_sirius.engine.placement import place
from offload_sirius.errors import BudgetError, ConfigError, PromptError

NOT_FIGURES = frozenset(("text", "token_ids", "finish_reason", "plan", "settings"))
"""What an answer has elsewhere, and what is the same for all."""

Place = tuple[int, Line]
"""A line, and its place in the input."""


class Answer(Protocol):
    """What is written for one prompt."""

    @property
    def state(self) -> Literal["waiting", "active", "done"]: ...

    @property
    def result(self) -> Generation: ...


class Batcher(Protocol):
    """Answers that are written together."""

    @property
    def max_answers(self) -> int: ...

    def submit(self, prompt: Prompt, config: GenerationConfig) -> Answer: ...

    def step(self) -> bool: ...


def answerable(model: Model, places: Iterable[Place], max_context: int | None) -> tuple[list[Place], dict[int, str], int]:
    """Those of the prompts that the model can answer, why it cannot the others, and positions that the longest answer takes.

    max_context: positions that there will be; None: as many as are needed.
    """
    able, errors, needed = list[Place](), dict[int, str](), 1
    for index, line in places:
        try:
            num_prompt = len(model.encode(line.prompt, chat=line.config.chat))
            if max_context is not None:
                model.room_for(num_prompt, line.config.max_new_tokens, max_context)
        except PromptError as error:
            errors[index] = _one_line(error)
            continue
        able.append((index, line))
        needed = max(needed, num_prompt + line.config.max_new_tokens)
    return able, errors, needed


def fastest_parallel(model: Model, config: EngineConfig, num_prompts: int) -> int:
    """How many answers at once are predicted to give the most tokens a second together: each takes memory that layers could have.

    Raises BudgetError where there is no memory for one.
    """
    best = place(model.checkpoint, replace(config, parallel=1))
    fastest, seconds = 1, best.predict(best.context).seconds_per_token
    most = min(num_prompts, MAX_PARALLEL)
    for parallel in (*(each for each in (2, 4, 8, 16, 32) if each < most), most):
        try:
            placement = place(model.checkpoint, replace(config, parallel=parallel))
        except BudgetError:
            break
        predicted = placement.predict(placement.context).seconds_per_token
        if predicted < seconds:
            fastest, seconds = parallel, predicted
    return fastest


def answer_all(
    batch: Batcher,
    places: Iterable[Place],
    on_answer: Callable[[int, dict[str, Any]], None],
    *,
    figures: bool,
) -> None:
    """Answer all of them. on_answer: is given each answer as it ends, with its prompt's place in the input.

    What ends all answers, weights that cannot be read for one, is raised; so is an interruption.
    """
    waiting, active = deque(places), dict[int, tuple[Line, Answer]]()
    while waiting or active:
        while waiting and len(active) < batch.max_answers:
            index, line = waiting.popleft()
            try:
                active[index] = line, batch.submit(line.prompt, line.config)
            except (ConfigError, PromptError) as error:
                on_answer(index, refused(line.id, _one_line(error)))
        batch.step()
        for index in [index for index, (_, answer) in active.items() if answer.state == "done"]:
            line, answer = active.pop(index)
            on_answer(index, answered(line.id, answer.result, figures=figures))


def answered(line_id: Id, result: Generation, *, figures: bool) -> dict[str, Any]:
    """The line of an answer. figures: with what differs from run to run, times and what was drafted."""
    usage = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.new_tokens,
        "total_tokens": result.prompt_tokens + result.new_tokens,
    }
    answer: dict[str, Any] = {
        "id": line_id,
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "usage": usage,
    }
    if figures:
        answer["figures"] = {name: value for name, value in result.as_json().items() if name not in NOT_FIGURES}
    return answer


def refused(line_id: Id, why: str) -> dict[str, Any]:
    """The line of a prompt that cannot be answered."""
    return {"id": line_id, "error": why}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
