"""What people see while they wait: on a terminal, and where there is none."""

from __future__ import annotations

import io
import re
import sys
import time
from dataclasses import replace

import pytest

from offload_sirius.cli.console import LoadProgress, TextWriter, advice, predicted, say, summary
from offload_sirius.config import DecodingConfig, EngineConfig, Mode
from offload_sirius.decode.result import Generation, LinkFigures, MemoryFigures, Passes, TokensByOrigin
from offload_sirius.decode.stream import TextPiece
from offload_sirius.engine.planning import DESCRIBED, assumed_rates, plan_model
from offload_sirius_loaders import open_checkpoint

CLEAR = "\x1b[K"
FAST, SLOW = 0.001, 2.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


def terminal_on_stdout(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 40 columns. No fixture: pytest puts its own stdout in place after those."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("os.get_terminal_size", lambda _: type("Size", (), {"columns": 40}))
    return screen


def piece(text: str, number: int = 1, seconds_per_token: float = FAST) -> TextPiece:
    return TextPiece(text=text, token_id=0, new_tokens=number, seconds=number * seconds_per_token)


def generation(num_tokens: int, link: LinkFigures) -> Generation:
    return Generation(
        model="m",
        mode="full",
        text="",
        token_ids=tuple(range(num_tokens)),
        finish_reason="length",
        prompt_tokens=1,
        ttft_seconds=0.5,
        decode_seconds=2.0 * (num_tokens - 1),
        load_seconds=0.0,
        passes=Passes(),
        link=link,
        memory=MemoryFigures(
            device_plan_bytes=0, device_peak_bytes=0, host_plan_bytes=0, host_peak_bytes=0, pinned_bytes=0, pageable_bytes=0
        ),
        plan={},
        settings={},
    )


def test_text_goes_to_stdout_and_lines_for_people_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    writer = TextWriter()
    writer.write(piece("one "))
    writer.write(piece("two", 2, SLOW))
    writer.end()
    say("a line")
    assert capsys.readouterr() == ("one two\n", "a line\n")


def test_a_text_that_never_began_leaves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    TextWriter().end()
    assert capsys.readouterr().out == ""


def test_an_empty_answer_is_an_empty_line(capsys: pytest.CaptureFixture[str]) -> None:
    writer = TextWriter()
    writer.write(piece(""))
    writer.end()
    assert capsys.readouterr().out == "\n"


def test_a_slow_model_shows_its_rate_behind_the_text_and_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_on_stdout(monkeypatch)
    writer = TextWriter()
    writer.write(piece("slow", 4, SLOW))
    rate = "  [0.50 tokens/s]"
    assert terminal.getvalue() == f"{CLEAR}slow\x1b[2m{rate}\x1b[0m\x1b[{len(rate)}D"
    writer.end()
    assert terminal.getvalue().endswith(f"{CLEAR}\n")


def test_a_fast_model_shows_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_on_stdout(monkeypatch)
    TextWriter().write(piece("fast"))
    assert terminal.getvalue() == CLEAR + "fast"


@pytest.mark.parametrize(("text", "shown"), [("x" * 30, False), ("x" * 30 + "\nx", True), ("x" * 45, True)])
def test_a_rate_that_would_wrap_is_not_shown(text: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_on_stdout(monkeypatch)
    TextWriter().write(piece(text, 1, SLOW))
    assert ("tokens/s" in terminal.getvalue()) == shown


def test_loading_is_told_in_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 4.0, 8.0, 8.0, 8.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    progress = LoadProgress()
    progress.begin("loading m", 10**10)
    progress.advance(10**9)
    assert capsys.readouterr().err == ""
    progress.advance(10**9)
    assert capsys.readouterr().err == "loading m: 2.0 of 10.0 GB, 0.25 GB/s, 32 s left\n"
    progress.end()


def test_loading_is_a_bar_on_a_terminal_and_gone_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = LoadProgress()
    progress.begin("loading m", 100)
    progress.advance(50)
    progress.end()
    assert "loading m" in screen.getvalue()


def test_the_summary_of_one_token_has_no_rate() -> None:
    assert summary(generation(1, LinkFigures())) == "1 tokens, first after 0.50 s"


def test_the_summary_of_a_streamed_answer_says_what_a_token_moved() -> None:
    link = LinkFigures(copied_bytes=10 * 10**9, gbytes_per_second=12.5, busy_share=0.987)
    assert summary(generation(5, link)) == (
        "5 tokens, first after 0.50 s, 0.50 tokens/s, 2.000 GB a token over the link at 12.50 GB/s, 99% busy"
    )


def corrected(correction_seconds: float | None) -> Generation:
    """Five tokens, at one in two seconds."""
    figures = {"mode": "sirius", "aal": 2.5, "acceptance": 0.7, "correction_seconds": correction_seconds}
    return replace(generation(5, LinkFigures()), **figures)


def test_the_summary_of_a_corrected_answer_says_what_a_correction_gave() -> None:
    assert summary(corrected(1.0)) == (
        "5 tokens, first after 0.50 s, 0.50 tokens/s, 2.50 tokens a correction (AAL), 70% of drafts accepted"
    )
    found = replace(corrected(1.0), tokens_by_origin=TokensByOrigin(full=2, draft=1, lookup=2))
    assert summary(found).endswith("70% of drafts accepted, 2 tokens looked up")


@pytest.mark.parametrize(
    ("correction_seconds", "told"),
    [(1.6, "drafts cost more than they saved: --mode full would give 0.62 tokens/s or more here"), (1.95, None), (4.0, None)],
)
def test_drafts_that_cost_more_than_they_saved_are_told_of(correction_seconds: float, told: str | None) -> None:
    assert advice(corrected(correction_seconds)) == told


def test_nothing_is_advised_of_an_answer_without_corrections() -> None:
    assert advice(corrected(None)) is None


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("full", r"^predicted: [\d.e-]+ s a token, first after "),
        ("sparse", r"^predicted: [\d.e-]+ s a token \(a draft step [\d.e-]+ s\), first after "),
        (
            "sirius",
            r"^predicted: [\d.e-]+ s a token \(a draft step .* s, a correction of 4 tokens .* s, were 80% of the drafted ",
        ),
    ],
)
def test_a_prediction_is_a_line_with_the_passes_it_is_made_of(mode: Mode, told: str) -> None:
    config = EngineConfig(model="synthetic:tiny", decoding=DecodingConfig(mode=mode, window=4))
    hardware = replace(DESCRIBED, free_host_nbytes=1 << 30, own_memory=False)
    prediction = plan_model(open_checkpoint(config.model), config, hardware).predict(assumed_rates(hardware), 8)
    assert re.match(told, predicted(prediction))
    assert predicted(prediction).endswith(" s, bound by computing (rates: assumed)")
