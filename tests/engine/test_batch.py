"""Answers that are written together: each the one that it is alone, and the weights cross the link once for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch

import offload_sirius
from offload_sirius.config import DecodingConfig
from offload_sirius.decode.stream import TextPiece
from offload_sirius.engine import Engine
from offload_sirius.engine.batch import Answer, Batch
from offload_sirius.errors import ConfigError, PromptError, WeightReadError
from offload_sirius.weights.hotset import HotStreamer
from offload_sirius.weights.streamer import WeightStreamer

from .conftest import CONTEXT, TINY, Budgets, Load, hot_budgets

SAMPLED: dict[str, Any] = {"temperature": 1.1, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 4}
HELLO = list(b"hello world")


@pytest.fixture(scope="module")
def plain() -> Iterator[Engine]:
    """The model by itself, which computes every prompt anew."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT) as engine:
        yield engine


def alone(plain: Engine, prompt: list[int], **settings: Any) -> tuple[int, ...]:
    return plain.generate(prompt, **settings | {"reuse": False, "mode": "full"}).token_ids


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an engine drafts."""

    hot: bool = False
    settings: dict[str, Any]


WAYS = {
    "full": Way(settings={"mode": "full"}),
    "kept neurons": Way(settings={"window": 4, "keep": 0.3}),
    "kept neurons in trees": Way(settings={"window": 4, "keep": 0.3, "tree_width": 3}),
    "by token": Way(settings={"window": 4, "keep": 0.3, "sparsity": "cats", "cats_threshold": "auto"}),
    "hot": Way(hot=True, settings={"window": "auto", "keep": 0.3}),
    "hot in trees": Way(hot=True, settings={"window": 4, "keep": 0.3, "tree_width": 3}),
    "hot as the prompts say": Way(hot=True, settings={"window": 4, "keep": 0.3, "refresh": False, "prior": False}),
}


def loaded(way: Way, parallel: int, load: Load, budgets: Budgets) -> Engine:
    decoding = DecodingConfig(**{"draft": "resident" if way.hot else "streamed"} | way.settings)
    given = hot_budgets(decoding, parallel=parallel) if way.hot else budgets("host", decoding=decoding, parallel=parallel)
    return load(mode=decoding.mode, draft=decoding.draft, decoding=decoding, parallel=parallel, **given)


def finished(batch: Batch) -> int:
    """Rounds until nothing is left."""
    num_rounds = 0
    while batch.step():
        num_rounds += 1
        assert num_rounds < 1000
    assert (batch.num_active, batch.num_waiting) == (0, 0)
    return num_rounds


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_answers_written_together_are_those_written_alone(way: Way, load: Load, budgets: Budgets, plain: Engine) -> None:
    engine, random = loaded(way, 3, load, budgets), Random(1)
    batch, asked, pieces = engine.batch(), list[tuple[Answer, list[int], dict[str, Any]]](), dict[int, list[TextPiece]]()
    cancelled = batch.submit(HELLO, max_new_tokens=20, ignore_eos=True)
    for index in range(8):  # come and go at different times
        prompt = [*HELLO[: random.randint(0, 11)], *random.choices(range(97, 103), k=random.randint(1, 12))]
        settings: dict[str, Any] = {"max_new_tokens": random.randint(1, 16), "ignore_eos": True}
        settings |= SAMPLED | {"seed": index} if index % 2 else {}
        pieces[index] = []
        answer = batch.submit(prompt, on_piece=pieces[index].append, **settings)
        assert answer.state == "waiting"
        asked.append((answer, prompt, settings))
        if index % 3 == 0:
            assert batch.step()
            assert batch.num_active <= batch.max_answers == 3
        if index == 4:
            cancelled.cancel()
    finished(batch)
    assert cancelled.result.finish_reason == "interrupted"
    assert cancelled.result.token_ids == alone(plain, HELLO, max_new_tokens=20)[: cancelled.result.new_tokens]
    for index, (answer, prompt, settings) in enumerate(asked):
        found = answer.result
        assert found.token_ids == alone(plain, prompt, **settings)
        assert (answer.state, found.finish_reason, found.prompt_tokens) == ("done", "length", len(prompt))
        assert "".join(piece.text for piece in pieces[index]) == found.text
        assert found.passes.full == 0 or way is WAYS["full"]
        assert found.memory.device_peak_bytes <= found.memory.device_plan_bytes
    assert any(answer.result.cached_tokens for answer, _, _ in asked)


def test_modes_may_be_mixed(load: Load, budgets: Budgets, plain: Engine) -> None:
    for way in (WAYS["hot"], WAYS["kept neurons in trees"]):
        batch = loaded(way, 4, load, budgets).batch()
        modes = ("full", "sirius", "sparse", "full", "sirius", "sirius", "sparse")
        settings: dict[str, Any] = {"max_new_tokens": 9, "ignore_eos": True}
        answers = [batch.submit([*HELLO, index], mode=mode, **settings) for index, mode in enumerate(modes)]
        assert finished(batch) <= 2 * 2 * 9
        for index, (mode, answer) in enumerate(zip(modes, answers, strict=True)):
            assert (answer.result.mode, answer.result.new_tokens) == (mode, 9)
            assert mode == "sparse" or answer.result.token_ids == alone(plain, [*HELLO, index], **settings)


@pytest.mark.parametrize("way", ["full", "hot", "kept neurons"])
def test_eight_together_move_the_bytes_of_one(way: str, load: Load, budgets: Budgets) -> None:
    # Windows of one length, and one prompt for all: what is drafted is the same.
    settings = {**WAYS[way].settings, "lookup": False} | ({} if way == "full" else {"window": 4})
    counted = []
    for parallel in (1, 8):
        engine = loaded(Way(hot=WAYS[way].hot, settings=settings), parallel, load, budgets)
        batch = engine.batch()
        answers = [batch.submit(HELLO[:5], max_new_tokens=13, ignore_eos=True) for _ in range(parallel)]
        finished(batch)
        streamed = engine._streamer.pass_nbytes
        passes = answers[0].result.passes
        counted.append((dict(streamed), passes))
        assert all(answer.result.passes == passes for answer in answers)
        assert streamed["prefill"] > 0
        if way == "full":
            assert streamed["full"] == 12 * engine.plan.pass_nbytes
        elif way == "hot":
            assert streamed["correction"] == passes.correction * engine.plan.pass_nbytes
    (one, passes_of_one), (eight, passes_of_eight) = counted
    if way == "full":
        assert eight == one
    else:  # more is said of the same text
        assert eight["prefill"] == one["prefill"]
        assert eight["correction"] * passes_of_one.correction == one["correction"] * passes_of_eight.correction


def test_a_prompt_goes_on_from_what_another_answer_has_computed(load: Load, budgets: Budgets, plain: Engine) -> None:
    engine = loaded(WAYS["hot"], 3, load, budgets)
    batch, settings = engine.batch(), {"max_new_tokens": 6, "ignore_eos": True}
    first = batch.submit(HELLO, **settings)
    batch.step()
    # Beside the first, which is still written; and behind its answer.
    second = batch.submit([*HELLO, 97, 98], **settings)
    finished(batch)
    further = [*HELLO, *first.result.token_ids, 97]
    third, fourth = batch.submit(further, **settings), batch.submit([*HELLO, 97, 99], **settings)
    finished(batch)
    assert [each.result.cached_tokens for each in (first, second, third, fourth)] == [0, 11, 16, 12]
    for answer, prompt in ((second, [*HELLO, 97, 98]), (third, further), (fourth, [*HELLO, 97, 99])):
        assert answer.result.token_ids == alone(plain, prompt, **settings)


def test_the_statistic_of_a_batch_is_that_of_the_answers_that_are_there(load: Load, budgets: Budgets) -> None:
    engine = loaded(WAYS["hot as the prompts say"], 2, load, budgets)
    batch, hot_set = engine.batch(), engine._streamed.sparsity

    def assert_rests_on(num_tokens: float) -> None:
        # The shares of a token are 1 together.
        assert torch.allclose(hot_set.squared_scores.sum(dim=1), torch.tensor(float(num_tokens)), rtol=1e-3)  # type: ignore[union-attr]

    first = batch.submit(HELLO, max_new_tokens=20, ignore_eos=True, mode="full")
    batch.step()
    assert_rests_on(11)
    batch.submit([1, 2, 3, 4], max_new_tokens=1)
    batch.step()
    assert_rests_on(15)
    num_held = len(engine._streamed.slots[0].token_ids)
    first.cancel()
    batch.submit([5, 6], max_new_tokens=1)
    batch.step()
    # The second one's tokens, and the first one's, have left with their answers.
    assert_rests_on(2)
    assert num_held == 13


def test_an_error_of_who_reads_an_answer_ends_that_one_only(load: Load, budgets: Budgets, plain: Engine) -> None:
    engine = loaded(WAYS["hot"], 2, load, budgets)
    batch, settings = engine.batch(), {"max_new_tokens": 12, "ignore_eos": True}

    def broken(piece: TextPiece) -> None:
        if piece.new_tokens == 3:
            raise ConnectionResetError("nobody is there")

    first, second = batch.submit(HELLO, on_piece=broken, **settings), batch.submit([*HELLO, 97], **settings)
    finished(batch)
    with pytest.raises(ConnectionResetError):
        _ = first.result
    assert isinstance(first.error, ConnectionResetError)
    assert second.result.token_ids == alone(plain, [*HELLO, 97], **settings)


@pytest.mark.parametrize("way", ["full", "hot in trees"])
@pytest.mark.parametrize("error", [WeightReadError("the disk is gone"), KeyboardInterrupt()], ids=["error", "interruption"])
def test_a_pass_that_breaks_ends_those_that_are_written_and_no_others(
    error: BaseException, way: str, load: Load, budgets: Budgets, plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded(WAYS[way], 2, load, budgets)
    batch, settings = engine.batch(), {"max_new_tokens": 9, "ignore_eos": True}
    answers = [batch.submit([*HELLO, index], **settings) for index in range(3)]
    assert batch.step()
    streamer = HotStreamer if WAYS[way].hot else WeightStreamer
    with monkeypatch.context() as patched:

        def attention(self: Any, layer: int) -> Any:
            raise error

        patched.setattr(streamer, "attention", attention)
        with pytest.raises(type(error)):
            batch.step()
    assert (batch.num_active, batch.num_waiting) == (0, 1)
    for index, answer in enumerate(answers[:2]):
        assert answer.state == "done"
        if isinstance(error, Exception):
            with pytest.raises(WeightReadError):
                _ = answer.result
        else:
            written = answer.result
            assert written.finish_reason == "interrupted"
            assert written.token_ids == alone(plain, [*HELLO, index], **settings)[: written.new_tokens] != ()
    finished(batch)
    assert answers[2].result.token_ids == alone(plain, [*HELLO, 2], **settings)
    assert (answers[2].result.cached_tokens > 0) == (not isinstance(error, Exception))


def test_prompts_that_would_take_more_memory_than_one_wait_for_the_next_round(load: Load, budgets: Budgets) -> None:
    batch = loaded(WAYS["full"], 3, load, budgets).batch()
    for index in range(3):
        batch.submit([index] * 30, max_new_tokens=9)
    rounds = []
    for _ in range(3):
        batch.step()
        rounds.append((batch.num_active, batch.num_waiting))
    assert rounds == [(1, 2), (2, 1), (3, 0)]


def test_what_cannot_be_answered_is_refused_when_it_is_submitted(load: Load, budgets: Budgets) -> None:
    engine = loaded(WAYS["hot"], 2, load, budgets)
    batch = engine.batch()
    with pytest.raises(PromptError, match="prompt and answer take 60 positions, 48 were planned for"):
        batch.submit([1] * 40, max_new_tokens=20)
    with pytest.raises(ConfigError, match="is asked for 225; load it with mode sirius and that window"):
        batch.submit(HELLO, max_new_tokens=8, window=8, tree_width=32)
    with pytest.raises(ConfigError) as caught:
        batch.submit(HELLO, max_new_tokens=8, draft_keep=0.2)
    assert str(caught.value) == (
        "answers of a batch share their drafts: the model was loaded with draft_keep None and is asked for 0.2"
    )
    answer = batch.submit(HELLO, max_new_tokens=8)
    with pytest.raises(RuntimeError, match="not finished"):
        _ = answer.result
    batch.step()
    with pytest.raises(RuntimeError, match="answers of a batch are being written"):
        engine.generate(HELLO, max_new_tokens=2)
    batch.close()
    assert answer.result.finish_reason == "interrupted"
    assert engine.generate(HELLO, max_new_tokens=2).new_tokens == 2
    with pytest.raises(RuntimeError, match="the batch is closed"):
        batch.submit(HELLO)


def test_what_is_refused_while_answers_are_written_leaves_them_as_they_are(load: Load, budgets: Budgets, plain: Engine) -> None:
    engine = loaded(WAYS["hot"], 2, load, budgets)
    batch, settings = engine.batch(), {"max_new_tokens": 12, "ignore_eos": True}
    short, answer = batch.submit(HELLO, max_new_tokens=1), batch.submit([*HELLO, 7], **settings)
    batch.step()
    assert (short.state, answer.state, engine._streamed.slots[0].is_busy) == ("done", "active", False)
    with pytest.raises(RuntimeError, match="are being written: end them before another one is begun"):
        engine.generate(HELLO, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="are being written: end them before a text is scored"):
        engine.score(HELLO, [[7]])
    finished(batch)
    assert answer.result.token_ids == alone(plain, [*HELLO, 7], **settings)
    (found,), (expected,) = engine.score(HELLO, [[7]])[0], plain.score(HELLO, [[7]])[0]
    assert found.log_probability == pytest.approx(expected.log_probability, abs=1e-4)


def test_a_batch_waits_until_the_places_are_its_own(load: Load, budgets: Budgets, plain: Engine) -> None:
    engine = load(mode="full", parallel=2, **budgets("host", parallel=2))
    first, second = engine.batch(), engine.batch()
    answers = [batch.submit(HELLO, max_new_tokens=5, ignore_eos=True) for batch in (first, second)]
    first.step()
    with pytest.raises(RuntimeError, match="answers of a batch are being written: end them before those of another one are"):
        second.step()
    assert [answer.state for answer in answers] == ["active", "waiting"]
    finished(first)
    finished(second)
    assert [answer.result.token_ids for answer in answers] == [alone(plain, HELLO, max_new_tokens=5, ignore_eos=True)] * 2


def test_pieces_have_log_probabilities_where_they_are_asked_for(load: Load, budgets: Budgets, plain: Engine) -> None:
    batch, pieces = loaded(WAYS["hot"], 2, load, budgets).batch(), list[TextPiece]()
    batch.submit(HELLO, on_piece=pieces.append, max_new_tokens=9, ignore_eos=True, logprobs=2, **SAMPLED)
    finished(batch)
    expected = list(plain.stream(HELLO, max_new_tokens=9, ignore_eos=True, logprobs=2, **SAMPLED))
    assert [piece.token_id for piece in pieces] == [piece.token_id for piece in expected]
    for found, wanted in zip(pieces, expected, strict=True):
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert len(found.top_logprobs) == (0 if found.token_id is None else 2)
    with pytest.raises(ConfigError) as caught:
        batch.submit(HELLO, max_new_tokens=4, mode="sparse", logprobs=0)
    assert str(caught.value) == "logprobs are the full model's, and mode sparse does not ask it; use mode full or sirius"


def test_an_answer_that_nobody_wants_any_more_takes_no_further_pass(load: Load, budgets: Budgets) -> None:
    engine = loaded(WAYS["full"], 2, load, budgets)
    batch = engine.batch()
    first, second, third = (batch.submit([*HELLO, index], max_new_tokens=20, ignore_eos=True) for index in range(3))
    batch.step()
    first.cancel()
    third.cancel()
    batch.step()
    assert (first.state, second.state, third.state) == ("done", "active", "done")
    assert (first.result.new_tokens, third.result.new_tokens, third.result.passes.prefill) == (2, 0, 0)
    assert (batch.num_active, batch.num_waiting) == (1, 0)
