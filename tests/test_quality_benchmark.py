"""benchmarks/quality.py: drafts beside others are those of answers alone, figures are what they are called, and it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from decimal import Decimal
from math import exp
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import offload_sirius
from offload_sirius.config import DecodingConfig, Sparsity
from offload_sirius.errors import PromptError

ROOT = Path(__file__).parents[1]
FOLDERS = [str(ROOT / "benchmarks"), str(ROOT / "tools")]
TINY = "synthetic:tiny?dtype=F32"


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The modules beside the script, as it imports them."""
    sys.path[:0] = FOLDERS
    import bootstrap
    import forced_text
    import gsm8k
    import own_neurons
    import quality
    from evidence import quality_plot

    yield SimpleNamespace(
        bootstrap=bootstrap,
        forced_text=forced_text,
        gsm8k=gsm8k,
        own_neurons=own_neurons,
        quality=quality,
        quality_plot=quality_plot,
    )
    for folder in FOLDERS:
        sys.path.remove(folder)


@pytest.mark.parametrize("sparsity", ["griffin", "cats"])
def test_answers_beside_others_are_those_of_an_engine_that_answers_one_at_a_time(
    scripts: SimpleNamespace, sparsity: Sparsity
) -> None:
    # No more neurons than that, so that the draft is wrong often enough.
    sparse = DecodingConfig(mode="sparse", sparsity=sparsity, keep=0.1, window=4, tree_width=2, draft="streamed", lookup=False)
    decoding = {"threshold": 0.0035}
    ways: list[dict[str, Any]] = [
        {"mode": "sparse"},
        {"mode": "sirius", "accept": "exact", "tree_width": 1},
        {"mode": "sirius", "accept": "threshold", "tree_width": 1, **decoding},
        {"mode": "sirius", "accept": "threshold", "tree_width": 2, **decoding},
    ]
    prompts = [[1, 2, 3, 4, 5], [200, 100, 50], [7] * 11, [9, 8, 7, 6]]
    settings: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True, "reuse": False}
    loaded: dict[str, Any] = {"device": "cpu", "max_context": 40} | vars(sparse) | {"mode": "sirius"}
    with offload_sirius.load(TINY, **loaded) as alone, offload_sirius.load(TINY, parallel=3, **loaded) as together:
        scripts.own_neurons.give_own_neurons(together)
        all_tokens = []
        for way in ways:
            batch = together.batch()
            answers = [batch.submit(prompt, **settings, **way) for prompt in prompts]
            while batch.step():
                pass
            expected = [alone.generate(prompt, **settings, **way) for prompt in prompts]
            assert [each.result.token_ids for each in answers] == [each.token_ids for each in expected]
            assert [each.result.aal for each in answers] == [each.aal for each in expected]
            all_tokens.append([each.token_ids for each in expected])
    assert all_tokens[0] != all_tokens[1], "the draft is the full model, and nothing is shown"
    assert all_tokens[2] != all_tokens[1]


class Place:
    """A slot that knows which pass has computed each of its positions."""

    def __init__(self) -> None:
        self.kinds = "left by another answer"

    def begin(self, num_cached: int) -> None:
        self.keep(num_cached)

    def keep(self, length: int) -> None:
        self.kinds = self.kinds[:length]


class Counting:
    """Says that each token is followed by the next number, 0 to 9; a draft that an odd one is followed by itself."""

    def __init__(self) -> None:
        self.read: list[str] = []
        """What each draft step found, and itself."""

    def run(self, asks: Sequence[Any]) -> list[torch.Tensor]:
        return [self._logits(ask) for ask in asks]

    def _logits(self, ask: Any) -> torch.Tensor:
        ask.slot.kinds += ask.kind[0] * len(ask.token_ids)
        if ask.kind == "draft":
            self.read.append(ask.slot.kinds)
        said = [each + (ask.kind != "draft" or each % 2 == 0) for each in ask.token_ids]
        return 10.0 * torch.nn.functional.one_hot(torch.tensor(said), 10)


@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_a_draft_reads_its_own_window_and_the_full_model_before_it(scripts: SimpleNamespace, num_rows: int) -> None:
    model, text = Counting(), scripts.forced_text.Text(prompt_ids=[5, 5], token_ids=[0, 1, 2, 3, 4, 5, 6])
    [found] = scripts.forced_text.nearness(model, [Place(), Place()], [text], 3, num_rows)
    # Windows of tokens 0 1 2 and 3 4 5, of which the full model gives 3 and 6: one more draft would find nothing left.
    assert model.read == ["ppd", "ppdd", "ppcccd", "ppcccdd"]
    assert (found.num_tokens, found.num_same) == (4, 2)
    # Both differ in two tokens, whose logits are 10 and 0: likelier by exp(10) here and less likely by as much there.
    difference = 10 * (exp(10) - 1) / (exp(10) + 9)
    assert found.kl == pytest.approx(2 * difference, rel=1e-5)


def test_without_correction_a_draft_reads_itself_up_to_the_last_token_but_one(scripts: SimpleNamespace) -> None:
    model = Counting()
    texts = [scripts.forced_text.Text(prompt_ids=[5], token_ids=list(range(length))) for length in (6, 1, 2, 3)]
    found = scripts.forced_text.nearness(model, [Place() for _ in texts], texts, 6, 2)
    assert [each.num_tokens for each in found] == [4, 0, 0, 1]
    assert model.read == ["pd", "pd", "pdd", "pddd", "pdddd"]


def test_an_interval_is_of_prompts_drawn_again(scripts: SimpleNamespace) -> None:
    figure_of = scripts.bootstrap.figure_of
    assert figure_of([(1, 0), (0, 0)]) is None
    same = figure_of([(1, 4)] * 5)
    assert (same.value, same.low, same.high) == (0.25, 0.25, 0.25)
    # Tokens count, not prompts; heads of 40 coins are within 0.5 +- 0.155 as often as 95 %.
    assert figure_of([(1, 1), (0, 9)]).value == 0.1
    coin = figure_of([(index % 2, 1) for index in range(40)])
    assert coin.low == pytest.approx(0.345, abs=0.03)
    assert coin.high == pytest.approx(0.655, abs=0.03)
    # Rows meet the same prompts: one that is better by as much everywhere is so at both ends.
    better = figure_of([(index % 2 + 1, 1) for index in range(40)])
    assert (better.low - coin.low, better.high - coin.high) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("text", "result", "right"),
    [
        ("3 + 4 = 7, so\n#### 7", "7", True),
        ("It costs $1,234.50.", "1234.5", True),
        ("That makes 18 dollars", "18.00", True),
        ("first 7, then 8", "7", False),
        ("half of it, .5", "0.5", True),
        ("below zero: -3", "-3", True),
        ("what is left is 8-3", "3", True),
        ("nothing to count", "0", False),
    ],
)
def test_the_last_number_of_an_answer_counts(scripts: SimpleNamespace, text: str, result: str, right: bool) -> None:
    assert scripts.gsm8k.is_right(text, Decimal(result)) is right


def test_examples_stand_before_a_problem_without_notes_for_a_calculator(scripts: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    lines = [("Two and two?", "2+2 = <<2+2=4>>4\n#### 4"), ("A thousand?", "#### 1,000")]
    file.write_text("\n".join(json.dumps({"question": question, "answer": answer}) for question, answer in lines))
    first, second = scripts.gsm8k.read_problems(file)
    assert second.result == 1000
    asked = "Question: Two and two?\nAnswer: 2+2 = 4\n#### 4\n\nQuestion: A thousand?\nAnswer:"
    assert scripts.gsm8k.ask(second, [first]) == asked
    file.write_text('{"question": "How many?", "answer": "#### many"}')
    with pytest.raises(PromptError, match=r"line 1: behind #### stands 'many'; it must be a number"):
        scripts.gsm8k.read_problems(file)


def test_an_exact_answer_that_differs_does_not_hold_in_float32(scripts: SimpleNamespace) -> None:
    def row(accept: str | None, identical: float) -> SimpleNamespace:
        return SimpleNamespace(accept=accept, identical=SimpleNamespace(value=identical))

    rows = [row(None, 0.1), row("exact", 1.0), row("threshold", 0.5)]
    assert scripts.quality.holds(rows, "float32")
    assert not scripts.quality.holds([*rows, row("exact", 47 / 48)], "float32")
    assert scripts.quality.holds([*rows, row("exact", 47 / 48)], "bfloat16")


def test_a_run_goes_on_behind_rows_of_the_same_settings(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = ["--num-prompts", "1", "--max-new-tokens", "4", "--window", "2", "--sparsity", "cats", "--keep", "0.5"]
    monkeypatch.setattr(sys, "argv", ["quality.py", "--model", TINY, "--device", "cpu", *sample])
    options = scripts.quality.arguments()
    loads, questions = scripts.quality.loads_of(options), scripts.quality.questions_of(options)
    scripts.quality.measure(options, loads[:2], questions, scripts.quality.KeptRows(tmp_path / "rows.tmp", {"window": 2}))
    kept = scripts.quality.KeptRows(tmp_path / "rows.tmp", {"window": 2})
    before = dict(kept.rows)
    assert list(before) == ["full", "cats 0.5 sparse", "cats 0.5 sirius exact w2", "cats 0.5 sirius threshold 0.1 w2"]
    scripts.quality.measure(options, loads, questions, kept)
    assert list(kept.rows) == [*before, "cats 0.5 sirius exact w2 t4", "cats 0.5 sirius threshold 0.1 w2 t4"]
    assert all(kept.rows[name] is before[name] for name in before if name != "full")
    assert not scripts.quality.KeptRows(tmp_path / "rows.tmp", {"window": 3}).rows


def test_the_script_keeps_rows_that_a_picture_is_made_of(
    scripts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    sample = ["--num-prompts", "2", "--max-new-tokens", "8", "--window", "4", "--sparsity", "griffin", "--keep", "0.5"]
    command = ["quality.py", "--model", TINY, "--device", "cpu", "--out", str(out), *sample]
    monkeypatch.setattr(sys, "argv", command)
    assert scripts.quality.main() == 0
    result = json.loads(out.read_text())
    names = ["full", "griffin 0.5 sparse"]
    names += [f"griffin 0.5 sirius {accept} w4{tree}" for tree in ("", " t4") for accept in ("exact", "threshold 0.1")]
    assert [row["name"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert row["identical"]["value"] == 1 or row["accept"] != "exact"
        assert row["num_tokens"] == [8, 8]
        assert row["num_same"] <= row["num_tokens"]
    assert result["held"]
    assert list(tmp_path.iterdir()) == [out], "what was done so far is kept only until all is"
    pictures = [tmp_path / "quality.svg", tmp_path / "again.svg"]
    for picture in pictures:
        scripts.quality_plot.draw(result, picture)
    # Two panels with a point of each row; the same file each time, so that a stale one can be told.
    assert pictures[0].read_text().count(">0.5</text>") == 2 * (len(names) - 1)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()

    monkeypatch.setattr(sys, "argv", [*command, "--window", "1"])
    assert scripts.quality.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --window is 1; it must be")
