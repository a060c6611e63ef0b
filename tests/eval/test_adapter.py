"""lm-evaluation-harness with a tiny model and tasks in files, offline."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_sirius.errors import ConfigError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'offload-sirius[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from offload_sirius.eval.__main__ import main  # noqa: E402
from offload_sirius.eval.adapter import OffloadSiriusLM  # noqa: E402

TASKS = Path(__file__).parent / "tasks"
NAMES = ["tiny_choice", "tiny_text", "tiny_answer"]
SETTINGS = {"device": "cpu", "threads": 1, "max_context": 64, "max_gen_toks": 8}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture(scope="module")
def model(chat_directory: Path) -> Iterator[OffloadSiriusLM]:
    model = OffloadSiriusLM(str(chat_directory), **SETTINGS)
    with model.engine:
        yield model


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """The tasks, which name their data by its path."""
    for task in TASKS.glob("*.yaml"):
        (tmp_path / task.name).write_text(task.read_text().replace("QUESTIONS", str(TASKS / "questions.jsonl")))
    return tmp_path


def asked(*arguments: Any) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def test_the_harness_knows_the_model_by_its_name() -> None:
    assert get_model("offload-sirius") is OffloadSiriusLM


def test_tasks_in_files_run_and_modes_give_the_same_figures(chat_directory: Path, tasks: Path, model: OffloadSiriusLM) -> None:
    def figures(model: OffloadSiriusLM | str, arguments: dict[str, Any] | None = None) -> dict[str, Any]:
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        found = lm_eval.simple_evaluate(
            model=model, model_args=arguments, tasks=list(NAMES), task_manager=manager, bootstrap_iters=0
        )["results"]
        return {name: {key: value for key, value in found[name].items() if "," in key} for name in NAMES}

    given = {"model": str(chat_directory), "mode": "full", "device_memory": 0.5, **SETTINGS}
    found = figures("offload-sirius", given)
    assert _close(figures(model), found)
    assert set(found["tiny_choice"]) >= {"acc,none", "acc_norm,none"}
    assert found["tiny_text"]["byte_perplexity,none"] > 1


def _close(found: Any, expected: Any) -> bool:
    if isinstance(found, dict):
        return found.keys() == expected.keys() and all(_close(found[key], expected[key]) for key in found)
    return found == (pytest.approx(expected, abs=1e-4) if isinstance(expected, float) else expected)


def test_the_likelihood_of_a_text_is_the_sum_of_its_windows(model: OffloadSiriusLM) -> None:
    text = "the tokens of a tiny model " * 8
    token_ids = model.tok_encode(text)
    assert len(token_ids) > model.max_length
    short = model.tok_encode(text)[:20]
    (whole,) = model.loglikelihood_rolling([asked(text)], disable_tqdm=True)
    assert whole < 0
    (beginning,) = model.engine.score([model.prefix_token_id], [short])
    decoded = model.engine.model.tokenizer.decode(short)
    assert model.tok_encode(decoded) == short
    (found,) = model.loglikelihood_rolling([asked(decoded)], disable_tqdm=True)
    assert found == pytest.approx(sum(each.log_probability for each in beginning), abs=1e-4)


def test_answers_come_back_in_the_order_of_the_requests(model: OffloadSiriusLM) -> None:
    pairs = [("b hello", " there"), ("a what", " do"), ("b hello", " x"), ("", "hello"), ("a what", " you say"), ("a", "")]
    together = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    alone = [model.loglikelihood([asked(*pair)], disable_tqdm=True)[0] for pair in pairs]
    assert [likely for _, likely in together] == [likely for _, likely in alone]
    assert [number for number, _ in together] == pytest.approx([number for number, _ in alone], abs=1e-4)
    assert together[-1] == (0.0, True), "nothing is certain"
    texts = model.generate_until([asked(text, {"until": []}) for text, _ in pairs[:3]], disable_tqdm=True)
    assert texts[0] == texts[2] == model.engine.generate(model.tok_encode("b hello"), max_new_tokens=8).text
    assert texts[1] == model.engine.generate(model.tok_encode("a what"), max_new_tokens=8).text


def test_texts_that_are_written_together_are_those_that_are_written_alone(chat_directory: Path, model: OffloadSiriusLM) -> None:
    requests = [asked(text, {"max_gen_toks": 4 + len(text)}) for text in ("hello", "what do", "hello there", "a", "good bye")]
    expected = model.generate_until(requests, disable_tqdm=True)
    together = OffloadSiriusLM(str(chat_directory), **SETTINGS, parallel=3, mode="full")
    with together.engine:
        assert together.generate_until(requests, disable_tqdm=True) == expected


def test_a_text_ends_before_its_first_stop_string_and_is_drawn_only_where_the_task_says_so(model: OffloadSiriusLM) -> None:
    (whole,) = model.generate_until(
        [asked("hello", {"until": ["\0"], "temperature": 2.0, "do_sample": False})], disable_tqdm=True
    )
    stop = whole[3]
    settings = {"until": stop, "max_gen_toks": 8, "num_beams": 1, "do_sample": False}
    (cut,) = model.generate_until([asked("hello", settings)], disable_tqdm=True)
    assert cut == whole[: whole.index(stop)]
    drawn = {"do_sample": True, "temperature": 2.0, "seed": 3, "max_new_tokens": 8}
    (other,) = model.generate_until([asked("hello", drawn)], disable_tqdm=True)
    assert other == model.engine.generate(model.tok_encode("hello"), max_new_tokens=8, temperature=2.0, seed=3).text


def test_equal_requests_are_drawn_each_anew(model: OffloadSiriusLM) -> None:
    drawn, prompt_ids = {"do_sample": True, "max_new_tokens": 8}, model.tok_encode("hello")
    requests = [asked("hello", drawn), asked("good bye", drawn), *(asked("hello", dict(drawn)) for _ in range(2))]
    first, _, *others = model.generate_until(requests, disable_tqdm=True)
    expected = [model.engine.generate(prompt_ids, max_new_tokens=8, temperature=1.0, seed=seed).text for seed in range(3)]
    assert [first, *others] == expected
    assert len({*expected}) == 3
    greedy = asked("hello", {"max_new_tokens": 8})
    assert len({*model.generate_until([greedy, greedy], disable_tqdm=True)}) == 1


def test_a_long_context_loses_its_beginning_with_a_warning(model: OffloadSiriusLM, caplog: pytest.LogCaptureFixture) -> None:
    context = ("hello there " * 40).strip()
    (found,) = model.loglikelihood([asked(context, " x")], disable_tqdm=True)
    token_ids = model.tok_encode(context + " x")
    num_scored = len(token_ids) - len(model.tok_encode(context))
    kept = token_ids[-model.max_length :]
    (scores,) = model.engine.score(kept[:-num_scored], [kept[-num_scored:]])
    assert found[0] == pytest.approx(sum(each.log_probability for each in scores), abs=1e-4)
    assert "is cut to its last" in caplog.text
    with pytest.raises(ConfigError, match="64 tokens behind a context are more than max_context has room for; raise it"):
        model.generate_until([asked("hello", {"max_gen_toks": 64})], disable_tqdm=True)


def test_a_chat_template_is_applied_and_an_answer_that_was_begun_goes_on(model: OffloadSiriusLM) -> None:
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}]
    assert model.apply_chat_template(said[:1]) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert model.apply_chat_template(said, add_generation_prompt=False) == model.apply_chat_template(said[:1]) + "well"


def test_longer_texts_than_the_context_are_refused_at_once(chat_directory: Path) -> None:
    with pytest.raises(ConfigError, match="max_gen_toks is 256, and there are 63 positions; give a larger max_context"):
        OffloadSiriusLM(str(chat_directory), device="cpu", threads=1, max_context=64)


def test_the_command_runs_the_harness(chat_directory: Path, tasks: Path) -> None:
    arguments = f"model={chat_directory},threads=1,max_context=64,max_gen_toks=8"
    common = ("--model", "offload-sirius", "--device", "cpu", "--tasks", "tiny_choice", "--include_path", str(tasks))
    command = [sys.executable, "-m", "offload_sirius.eval", *common, "--output_path", str(tasks / "out")]
    done = subprocess.run([*command, "--model_args", arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    (file,) = (tasks / "out").rglob("results_*.json")
    assert 0 <= json.loads(file.read_text())["results"]["tiny_choice"]["acc,none"] <= 1


def test_the_command_says_in_one_line_what_is_wrong(
    chat_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: OffloadSiriusLM(str(chat_directory), volume=3))
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: unknown setting volume; known are ")
