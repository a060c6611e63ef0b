"""What the full model says of given tokens, wherever its layers are, and in how many passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import offload_sirius
from offload_sirius.config import DecodingConfig
from offload_sirius.decode.scoring import Scorer
from offload_sirius.engine import Engine
from offload_sirius.errors import PromptError, WeightReadError
from offload_sirius.model.costs import activation_nbytes, scored_rows
from offload_sirius.model.transformer import Transformer
from offload_sirius_loaders import open_checkpoint

from .conftest import CONTEXT, TINY, Budgets, Load, hot_budgets

CONTEXT_IDS = list(b"hello wor")
CHOICES = [list(b"ld"), list(b"lf"), list(b"m"), list(b"ld and more"), list(b"x")]
SPEC = open_checkpoint(TINY).spec
HOT = DecodingConfig(keep=0.3, window=4, draft="resident")


@pytest.fixture(scope="module")
def expected() -> list[list[tuple[float, bool]]]:
    """By log softmax of the logits behind each beginning, every one of them a prompt of its own."""
    with offload_sirius.load(TINY, mode="full", device="cpu", threads=1, max_context=CONTEXT) as engine:
        return [[_of(engine, [*CONTEXT_IDS, *choice[:n]], choice[n]) for n in range(len(choice))] for choice in CHOICES]


def _of(engine: Engine, prompt: list[int], token_id: int) -> tuple[float, bool]:
    engine._transformer.cache.keep(0)
    engine._streamer.begin("prefill", "records", following="records")  # type: ignore[attr-defined]
    logits = engine._transformer.prefill(torch.tensor(prompt))
    return float(logits.log_softmax(0)[token_id]), int(logits.argmax()) == token_id


def found(engine: Engine, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[list[tuple[float, bool]]]:
    return [[(each.log_probability, each.is_likeliest) for each in scores] for scores in engine.score(context, choices)]


def assert_close(found: list[list[tuple[float, bool]]], expected: list[list[tuple[float, bool]]]) -> None:
    assert [[likeliest for _, likeliest in each] for each in found] == [[likeliest for _, likeliest in each] for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert [number for number, _ in ours] == pytest.approx([number for number, _ in theirs], abs=1e-4)


@pytest.mark.parametrize("where", ["resident", "host", "disk"])
def test_scores_are_the_log_softmax_of_the_full_models_logits(
    where: str, load: Load, budgets: Budgets, expected: list[list[tuple[float, bool]]]
) -> None:
    engine = load(**budgets(where))
    assert_close(found(engine, CONTEXT_IDS, CHOICES), expected)
    assert_close(found(engine, CONTEXT_IDS, CHOICES), expected)


@pytest.mark.parametrize("drafts", [{"draft": "resident"}, {"draft": "streamed"}, {"sparsity": "cats"}], ids=str)
def test_drafts_have_no_part_in_scores_and_scores_none_in_answers(
    drafts: dict[str, Any], load: Load, expected: list[list[tuple[float, bool]]]
) -> None:
    budgets = hot_budgets(HOT) if drafts.get("draft") == "resident" else {}
    engine, plain = load(mode="sirius", keep=0.3, window=4, **drafts, **budgets), load()
    assert_close(found(engine, CONTEXT_IDS, CHOICES), expected)
    for _ in range(2):
        answer = engine.generate(CONTEXT_IDS, max_new_tokens=8, ignore_eos=True)
        assert answer.token_ids == plain.generate(CONTEXT_IDS, max_new_tokens=8, ignore_eos=True).token_ids
        assert_close(found(engine, CONTEXT_IDS, CHOICES), expected)


def test_the_likeliest_tokens_are_those_of_mode_full(load: Load) -> None:
    engine = load()
    answer = engine.generate(CONTEXT_IDS, max_new_tokens=6, ignore_eos=True).token_ids
    (scores,) = engine.score(CONTEXT_IDS, [answer])
    assert all(each.is_likeliest for each in scores)


def test_choices_of_one_token_take_one_pass_and_others_compute_their_own_tokens(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    prefill_rows = Transformer.prefill_rows

    def counted(self: Transformer, token_ids: torch.Tensor, *arguments: Any, **settings: Any) -> None:
        passes.append(len(token_ids))
        prefill_rows(self, token_ids, *arguments, **settings)

    monkeypatch.setattr(Transformer, "prefill_rows", counted)
    engine = load()
    engine.score(CONTEXT_IDS, [[1], [2], [3], [4]])
    assert passes == [len(CONTEXT_IDS)]
    engine.score(CONTEXT_IDS, [[1], [2, 3], [4], [2, 5], [6, 7, 8]])
    assert passes[1:] == [1, 2, 3], "behind the context but for its last token, whose logits are wanted again"


@pytest.mark.parametrize("num_rows", [1, 2, 100])
def test_logits_are_made_as_many_at_once_as_there_is_room_for(
    num_rows: int, load: Load, monkeypatch: pytest.MonkeyPatch, expected: list[list[tuple[float, bool]]]
) -> None:
    monkeypatch.setattr("offload_sirius.engine.engine.scored_rows_of", lambda *_: num_rows)
    read: list[int] = []
    monkeypatch.setattr(Scorer, "read", lambda self, logits, plain=Scorer.read: (read.append(len(logits)), plain(self, logits)))
    assert_close(found(load(), CONTEXT_IDS, CHOICES[3:4]), expected[3:4])
    assert max(read) == min(num_rows, len(CHOICES[3]))


@given(num_tokens=st.integers(1, 5000), step_rows=st.integers(1, 100), observed=st.booleans())
def test_the_logits_that_are_made_at_once_take_no_more_than_was_planned(num_tokens: int, step_rows: int, observed: bool) -> None:
    spec = SPEC
    rows = scored_rows(spec, num_tokens, 4, step_rows=step_rows, observed=observed)
    assert rows >= step_rows
    hidden = max(num_tokens, step_rows) * spec.width * 4
    planned = activation_nbytes(spec, num_tokens, 4, step_rows=step_rows, observed=observed)
    assert hidden + rows * spec.vocab_size * 8 <= planned < hidden + (rows + 1) * spec.vocab_size * 8


def test_what_does_not_fit_or_is_no_token_is_refused(load: Load) -> None:
    engine = load()
    assert len(engine.score([1] * (CONTEXT - 1), [[2, 3]])[0]) == 2
    for context, choices, message in [
        ([1] * CONTEXT, [[2, 3]], "shorten them"),
        ([1], [[2], [512]], "token id 512 is outside the vocabulary"),
        ([], [[2]], "the prompt is empty"),
    ]:
        with pytest.raises(PromptError, match=message):
            engine.score(context, choices)


def test_logits_that_are_no_numbers_are_refused() -> None:
    scorer = Scorer([[0], [1]], 7)
    scorer.read(torch.tensor([[1.0, 2.0]]))
    assert [each.is_likeliest for each in scorer.scores[0]] == [False]
    with pytest.raises(WeightReadError, match="position 8: the logits hold NaN or infinity"):
        scorer.read(torch.tensor([[float("nan"), 0.0]]))


@settings(max_examples=50)
@given(logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6))
def test_the_probabilities_of_all_tokens_together_are_one(logits: list[float]) -> None:
    scorer = Scorer([range(len(logits))], 0)
    scorer.read(torch.tensor([logits]))
    (scores,) = scorer.scores
    assert sum(torch.tensor([each.log_probability for each in scores]).exp()) == pytest.approx(1, abs=1e-5)
    assert sum(each.is_likeliest for each in scores) == 1
