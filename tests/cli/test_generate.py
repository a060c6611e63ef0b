"""`offload-sirius generate` on the tiny synthetic model: the text, the JSON contract, and what each group of flags does."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig
from offload_sirius.decode.stream import TextPiece
from offload_sirius.weights.copiers import PacedTransfer

from .conftest import Pipe, Ran, Run

STREAMED = ("--device-memory", "880KiB")
"""The tiny model's four layers and a short context do not fit."""

SHORT = ("--model", "synthetic:tiny?positions=16", "--prompt", "hi", "--device", "cpu", "--threads", "1")
"""A model of 16 positions."""

CONTRACT: dict[str, Any] = {
    "model": str,
    "mode": str,
    "text": str,
    "token_ids": list,
    "finish_reason": str,
    "prompt_tokens": int,
    "cached_tokens": int,
    "new_tokens": int,
    "ttft_seconds": float,
    "decode_seconds": float,
    "tokens_per_second": float,
    "passes": {"prefill": int, "draft": int, "correction": int, "full": int},
    "link": {
        "bytes": {"load": int, "prefill": int, "draft": int, "correction": int, "full": int, "discarded": int},
        "copied_bytes": int,
        "gbytes_per_second": float,
        "measured_peak_gbytes_per_second": float,
        "busy_share": float,
    },
    "aal": None,
    "acceptance": None,
    "effective_density": None,
    "window": None,
    "windows": int,
    "draft_seconds": None,
    "correction_seconds": None,
    "tokens_by_origin": {"full": int, "draft": int, "lookup": int},
    "flips": None,
    "memory": {"device_plan_bytes": int, "device_peak_bytes": int, "host_plan_bytes": int, "host_peak_bytes": int},
    "plan": {"resident_layers": list, "host_layers": list, "disk_layers": list, "num_slots": int},
    "settings": {"model": str, "sampling": dict, "max_new_tokens": int, "stop": list},
}


def figures(ran: Ran) -> dict[str, Any]:
    """The one JSON object, which is all there is on stdout."""
    assert ran.out.count("\n") == 1
    assert ran.out.endswith("\n")
    found = json.loads(ran.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(found, dict)
    return found


def assert_has(found: Any, wanted: Any, where: str = "") -> None:
    """Every key of the contract, each with a value of its type."""
    if isinstance(wanted, dict):
        for key, each in wanted.items():
            assert_has(found[key], each, f"{where}.{key}")
    else:
        assert found is None if wanted is None else isinstance(found, wanted), where


def test_the_text_alone_is_on_stdout_and_one_line_of_figures_on_stderr(tiny: Run) -> None:
    ran, told = tiny("--prompt", "hi", "--mode", "full"), figures(tiny("--prompt", "hi", "--mode", "full", "--json"))
    assert ran.code == 0
    assert ran.out == told["text"] + "\n"
    assert re.fullmatch(r"8 tokens, first after \d+\.\d\d s, \d+\.\d\d tokens/s\n", ran.err)


def test_the_line_of_figures_tells_how_drafts_fared(tiny: Run) -> None:
    line = tiny("--prompt", "hi").err.splitlines()[0]  # another may follow, where drafts happened to cost more than they saved
    corrected = r"\d\.\d\d tokens a correction \(AAL\), \d+% of drafts accepted"
    assert re.fullmatch(rf"8 tokens, first after \d+\.\d\d s, \d+\.\d\d tokens/s, {corrected}", line)


def test_the_figures_of_a_streamed_model_tell_of_the_link(tiny: Run) -> None:
    err = tiny("--prompt", "hi", "--mode", "full", *STREAMED).err
    assert re.search(r"0\.\d{3} GB a token over the link at \d+\.\d\d GB/s, \d+% busy$", err)


def test_json_is_one_object_with_all_documented_keys(tiny: Run) -> None:
    ran = tiny("--prompt", "hi", "--json", "--mode", "full", *STREAMED)
    assert ran.code == 0
    found = figures(ran)
    assert_has(found, CONTRACT)
    assert (found["model"], found["mode"], found["finish_reason"]) == ("synthetic:tiny?dtype=F32", "full", "length")
    assert (found["prompt_tokens"], found["new_tokens"], len(found["token_ids"])) == (2, 8, 8)
    assert found["passes"] == {"prefill": 1, "draft": 0, "correction": 0, "full": 7}


def test_json_of_a_resident_model_has_no_rates_of_a_link(tiny: Run) -> None:
    link = figures(tiny("--prompt", "hi", "--json"))["link"]
    assert (link["gbytes_per_second"], link["measured_peak_gbytes_per_second"], link["busy_share"]) == (None, None, None)
    assert link["bytes"]["load"] > 0


def test_json_of_a_single_token_has_no_rate_of_tokens(tiny: Run) -> None:
    found = figures(tiny("--prompt", "hi", "--json", "--max-new-tokens", "1"))
    assert (found["tokens_per_second"], found["decode_seconds"]) == (None, 0)


def test_settings_that_are_not_given_have_their_defaults(run: Run) -> None:
    settings = figures(run("generate", *SHORT, "--json"))["settings"]
    assert (settings.pop("threads"), settings.pop("device")) == (1, "cpu")
    assert settings.pop("model") == "synthetic:tiny?positions=16"
    assert settings.pop("max_context") == 16
    assert settings.pop("stop") == []
    assert settings.pop("sampling") == vars(GenerationConfig().sampling)
    assert settings.pop("decoding") == vars(DecodingConfig())
    defaults = vars(EngineConfig()) | vars(GenerationConfig()) | vars(DecodingConfig())
    assert settings["mode"] == "sirius"
    assert settings == {name: defaults[name] for name in settings}


def test_an_answer_ends_where_the_model_has_no_more_positions(run: Run) -> None:
    found = figures(run("generate", *SHORT, "--json"))
    assert (found["new_tokens"], found["finish_reason"]) == (15, "length")


def test_the_prompt_may_come_through_a_pipe(tiny: Run, pipe: Pipe) -> None:
    given = tiny("--prompt", "hi")
    pipe(b"hi\n")
    assert tiny().out == given.out


def test_each_of_several_stop_strings_ends_the_answer(tiny: Run) -> None:
    text = figures(tiny("--prompt", "hi", "--json"))["text"]
    # The tiny model's text has no character twice near its start.
    for stop in (text[2], text[4]):
        found = figures(tiny("--prompt", "hi", "--json", "--stop", "nowhere", "--stop", stop))
        assert (found["text"], found["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_the_same_seed_gives_the_same_text_and_another_one_another(tiny: Run) -> None:
    first, again, other = (tiny("--prompt", "hi", "--temperature", "1", "--seed", seed).out for seed in ("7", "7", "8"))
    assert first == again
    assert first != other


def test_ignore_eos_and_no_chat_reach_the_settings(tiny: Run) -> None:
    settings = figures(tiny("--prompt", "hi", "--json", "--ignore-eos", "--no-chat"))["settings"]
    assert (settings["ignore_eos"], settings["chat"]) == (True, False)


@pytest.mark.parametrize(("given", "lookup"), [((), None), (("--lookup",), True), (("--no-lookup",), False)])
def test_lookup_is_left_to_the_rule_of_acceptance_unless_a_flag_says_otherwise(
    given: tuple[str, ...], lookup: bool | None, tiny: Run
) -> None:
    assert figures(tiny("--prompt", "hi", "--json", *given))["settings"]["decoding"]["lookup"] is lookup


@pytest.mark.parametrize("size", ["880KiB", "0.86MiB", "901120", "880 kib", "901KB", "0.9MB"])
def test_a_size_is_written_in_any_of_these_forms(size: str, tiny: Run) -> None:
    found = figures(tiny("--prompt", "hi", "--json", "--device-memory", size))
    assert found["plan"]["num_slots"] >= 2
    assert found["memory"]["device_plan_bytes"] <= 902_000


def test_a_size_may_be_a_share_of_what_is_free(tiny: Run) -> None:
    assert figures(tiny("--prompt", "hi", "--json", "--device-memory", "0.01"))["plan"]["num_slots"] == 0


def test_the_text_does_not_depend_on_where_the_layers_are(tiny: Run) -> None:
    assert tiny("--prompt", "hi").out == tiny("--prompt", "hi", *STREAMED).out


def test_verbose_explains_the_plan_on_stderr(tiny: Run) -> None:
    ran = tiny("--prompt", "hi", "--verbose", *STREAMED)
    layers = r"^layers: \d resident, \d streamed from host memory, 0 from disk, through \d slots; [\d.]+ \w+ a pass$"
    assert re.search(layers, ran.err, re.MULTILINE)
    assert re.search(r"^device: head [\d.]+ KiB, .*slots [\d.]+ KiB$", ran.err, re.MULTILINE)
    passes = r"a draft step [\d.e-]+ s, a correction of \d+ tokens [\d.e-]+ s, were 80% of the drafted tokens accepted"
    predicted = rf"^predicted: [\d.e-]+ s a token \({passes}\), first after [\d.e-]+ s, bound by \w+( \w+)? \(rates: assumed\)$"
    assert re.search(predicted, ran.err, re.MULTILINE)
    assert "kept neurons for drafts " in ran.err
    assert ran.out == tiny("--prompt", "hi").out


CORRECTED: dict[str, Any] = {
    "aal": float,
    "acceptance": float,
    "effective_density": float,
    "window": int,
    "windows": int,
    "draft_seconds": float,
    "correction_seconds": float,
    "tokens_by_origin": {"full": int, "draft": int, "lookup": int},
    "link": {"bytes": {"discarded": int}},
}


@pytest.mark.parametrize("sparsity", ["griffin", "cats"])
def test_json_of_corrected_drafts_has_their_figures(sparsity: str, tiny: Run) -> None:
    found = figures(tiny("--prompt", "hi", "--json", "--sparsity", sparsity, "--window", "4", *STREAMED))
    assert_has(found, CONTRACT | CORRECTED)
    assert found["mode"] == "sirius"
    assert found["passes"]["full"] == 0
    assert found["passes"]["correction"] == found["windows"] > 0
    assert sum(found["tokens_by_origin"].values()) == found["new_tokens"] == 8
    assert (found["window"], found["settings"]["decoding"]["sparsity"]) == (4, sparsity)
    assert (found["link"]["cache_hit_share"] is None) == (sparsity == "griffin")


def test_json_of_drafts_alone_has_no_windows(tiny: Run) -> None:
    found = figures(tiny("--prompt", "hi", "--json", "--mode", "sparse"))
    assert found["passes"] == {"prefill": 1, "draft": 7, "correction": 0, "full": 0}
    assert (found["mode"], found["windows"], found["aal"], found["window"]) == ("sparse", 0, None, None)


@pytest.mark.parametrize("decoding", [(), ("--sparsity", "cats"), ("--tree-width", "3"), ("--window", "2"), ("--keep", "0.1")])
def test_the_text_does_not_depend_on_the_drafts(decoding: tuple[str, ...], tiny: Run) -> None:
    plain = tiny("--prompt", "hi", "--mode", "full")
    assert tiny("--prompt", "hi", *decoding).out == plain.out


def test_a_context_too_small_for_the_request_is_refused_before_anything_is_loaded(
    tiny: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sirius.engine.build", lambda *_: pytest.fail("loaded"))
    ran = tiny("--prompt", "hello", "--max-context", "6")
    assert ran.code == 2
    assert "prompt and answer take 13 positions, 6 were planned for" in ran.err


@pytest.fixture
def interrupted_pass(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real Ctrl-C while the main thread waits for the emulated link, some tokens into the answer."""
    waits = 0
    wait = PacedTransfer.wait

    def wait_or_interrupt(self: PacedTransfer) -> None:
        nonlocal waits
        waits += 1
        if waits == 30:
            signal.raise_signal(signal.SIGINT)
        wait(self)

    monkeypatch.setattr(PacedTransfer, "wait", wait_or_interrupt)
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "copier"))] == []


SLOW = ("--mode", "full", *STREAMED, "--prompt", "hi", "--link-gbps", "0.1")


@pytest.mark.usefixtures("interrupted_pass")
def test_ctrl_c_in_the_middle_keeps_the_text_and_leaves_with_130(tiny: Run) -> None:
    whole = figures(tiny("--prompt", "hi", "--json"))["text"]
    ran = tiny(*SLOW)
    assert ran.code == 130
    assert ran.out.endswith("\n")
    assert whole.startswith(ran.out.removesuffix("\n"))
    assert re.match(r"[1-7] tokens, first after", ran.err)
    assert "Traceback" not in ran.err


@pytest.mark.usefixtures("interrupted_pass")
def test_ctrl_c_within_a_window_keeps_what_was_corrected(tiny: Run) -> None:
    whole = figures(tiny("--prompt", "hi", "--json", "--mode", "full"))["text"]
    ran = tiny(*SLOW[2:])
    assert ran.code == 130
    assert whole.startswith(ran.out.removesuffix("\n"))
    assert re.match(r"1 tokens, first after", ran.err), "the third pass after the prompt is a draft of the first window"
    assert "Traceback" not in ran.err


@pytest.mark.usefixtures("interrupted_pass")
def test_ctrl_c_with_json_still_gives_the_object(tiny: Run) -> None:
    ran = tiny(*SLOW, "--json")
    assert ran.code == 130
    found = figures(ran)
    assert_has(found, CONTRACT)
    assert found["finish_reason"] == "interrupted"
    assert 1 <= found["new_tokens"] < 8


def test_ctrl_c_while_loading_leaves_with_130_and_says_nothing(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("offload_sirius.cli.console.LoadProgress.begin", interrupt)
    ran = tiny("--prompt", "hi", "--json")
    assert (ran.code, ran.out, ran.err) == (130, "", "")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("reader")] == []


def test_ctrl_c_before_the_first_token_leaves_no_text(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("offload_sirius.model.transformer.Transformer.prefill_all", interrupt)
    ran = tiny("--prompt", "hi")
    assert (ran.code, ran.out) == (130, "")


def test_characters_that_stdout_cannot_show_are_replaced(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert tiny("--prompt", "hi").code == 0
    sys.stdout.flush()
    assert b"?" in written.getvalue()


def test_pieces_are_written_as_they_come(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[TextPiece] = []
    monkeypatch.setattr("offload_sirius.cli.console.TextWriter.write", lambda _, piece: pieces.append(piece))
    tiny("--prompt", "hi")
    assert [piece.new_tokens for piece in pieces] == [1, 2, 3, 4, 5, 6, 7, 8, 8]


def test_a_trace_is_written_beside_the_answer(tiny: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert tiny("--prompt", "hi", *STREAMED, "--trace", str(path)).out == tiny("--prompt", "hi").out
    rows = {event["cat"] for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"}
    assert rows == {"copy", "compute", "wait", "sample"}


def test_a_trace_that_cannot_be_written_is_refused_before_the_model_is_opened(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offload_sirius.engine.open_model", lambda _: pytest.fail("opened"))
    path = tmp_path / "nowhere" / "trace.json"
    ran = tiny("--prompt", "hi", "--trace", str(path))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"error: --trace {path}: cannot be written: No such file or directory; name a file in a folder that can be written to\n"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [((), ""), (("--draft-keep", "0.25"), ", of which a draft computes 44"), (("--draft-keep", "0.5"), "")],
    ids=str,
)
def test_verbose_tells_how_many_of_the_resident_neurons_a_draft_computes(flags: tuple[str, ...], said: str, tiny: Run) -> None:
    shown = tiny("--prompt", "hi", "--draft", "resident", "--verbose", *flags)
    assert shown.code == 0
    line = next(line for line in shown.err.splitlines() if line.startswith("drafts: "))
    assert line == f"drafts: attention block and 88 of 176 neurons of 4 of 4 layers are resident{said}"


def test_a_cache_folder_that_cannot_be_written_is_one_warning_and_the_answer_is_the_same(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tiny("--prompt", "hi", "--draft", "resident")
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "file" / "cache"))
    found = tiny("--prompt", "hi", "--draft", "resident")
    assert (found.code, found.out) == (expected.code, expected.out)
    [line] = [line for line in found.err.splitlines() if "--no-prior" in line]
    assert line.startswith(f"warning: {tmp_path}/file/cache/priors/synthetic_tiny")
    assert "--no-prior" not in tiny("--prompt", "hi", "--draft", "resident", "--no-prior").err
