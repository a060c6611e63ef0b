"""Where the prompt comes from, and what is said where it cannot be had."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from offload_sirius.cli.prompt import read_prompt
from offload_sirius.errors import PromptError

from .conftest import Pipe


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class BrokenBytes(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        raise OSError(5, "Input/output error")


def message_of(prompt: str | None = None, prompt_file: str | None = None) -> str:
    with pytest.raises(PromptError) as caught:
        read_prompt(prompt, prompt_file)
    return str(caught.value)


def test_a_prompt_is_taken_as_it_is() -> None:
    assert read_prompt(" a\n", None) == " a\n"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a b", "a b"),
        (b"a\n", "a"),
        (b"a\r\n", "a"),
        (b"a\n\n", "a\n"),
        (b"\n", ""),
        (b"", ""),
        ("naïve 🦜".encode(), "naïve 🦜"),
    ],
)
def test_one_line_break_at_the_end_of_a_file_or_pipe_is_not_the_prompts(
    content: bytes, text: str, tmp_path: Path, pipe: Pipe
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(content)
    assert read_prompt(None, str(file)) == text
    pipe(content)
    assert read_prompt(None, None) == text


def test_a_dash_for_the_file_is_standard_input(pipe: Pipe) -> None:
    pipe(b"from the pipe")
    assert read_prompt(None, "-") == "from the pipe"


def test_a_dash_for_the_file_is_read_from_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Typed(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(b"typed\n")))
    assert read_prompt(None, "-") == "typed"


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert message_of() == "there is no prompt; give --prompt TEXT, --prompt-file FILE, or text on standard input"


@pytest.mark.parametrize("prompt_file", [None, "-"])
def test_a_closed_standard_input_is_no_prompt(prompt_file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert message_of(None, prompt_file).startswith("there is no prompt; give --prompt TEXT")


def test_standard_input_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(BrokenBytes())))
    assert message_of() == "standard input: Input/output error; give --prompt TEXT or --prompt-file FILE"


def test_bytes_on_standard_input_that_are_not_utf8_are_refused(pipe: Pipe) -> None:
    pipe(b"ab\xff")
    assert message_of() == "standard input: byte 2 is 0xff, not UTF-8; convert it, for example with iconv -t utf-8"


def test_two_prompts_are_one_too_many() -> None:
    assert message_of("a", "b") == "--prompt and --prompt-file are both given; give one of them"
