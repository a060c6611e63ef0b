"""Where a chat's lines come from: a terminal, with editing, history and completion, or whatever stands on standard input.

A line is a message or a command. Between triple quotes a message may have several lines, and may begin with a slash.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History
from prompt_toolkit.input import Input as Keys
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output

from offload_sirius.cache import cache_folder
from offload_sirius.cli.console import say
from offload_sirius.cli.termination import TerminatedError
from offload_sirius.errors import PromptError

QUOTES = '"""'
"""Around a message of several lines."""

ANY_FILE = "FILE"
"""Stands for the name of any file where words are offered."""


class ChatInput(Protocol):
    """What a chat asks for the next line."""

    def read(self) -> str | None:
        """A message or a command; None when there is no more. Raises PromptError where a line cannot be used."""


def is_open(text: str) -> bool:
    """Whether a text begins with quotes that have not been closed."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))


def unquoted(text: str) -> str:
    """What stands between the quotes, closed or not; a text without quotes as it is."""
    stripped = text.strip()
    if not stripped.startswith(QUOTES):
        return text
    return stripped.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


class PlainInput:
    """Lines of standard input, which is no terminal. Text that ends within quotes ends them."""

    def __init__(self) -> None:
        """Raises PromptError where there is no standard input."""
        # Python has no sys.stdin where the shell closed it.
        if sys.stdin is None:
            raise PromptError("there is no standard input; start the chat in a terminal, or give it lines through a pipe")
        self._num_lines = 0

    def read(self) -> str | None:
        """See ChatInput."""
        line = self._line()
        if line is None:
            return None
        while is_open(line) and (further := self._line()) is not None:
            line += further
        return line.removesuffix("\n").removesuffix("\r")

    def _line(self) -> str | None:
        try:
            content = sys.stdin.buffer.readline()
        except OSError as error:
            raise PromptError(f"standard input: {error.strerror}; give it lines through a pipe") from error
        self._num_lines += 1
        try:
            return content.decode("utf-8") if content else None
        except UnicodeDecodeError as error:
            raise PromptError(
                f"line {self._num_lines} of standard input: byte {error.start} is 0x{content[error.start]:02x}, not UTF-8; "
                "convert it, for example with iconv -t utf-8"
            ) from error


class TerminalInput:
    """Lines typed into a terminal."""

    def __init__(
        self,
        words: Mapping[str, Iterable[str]],
        toolbar: Callable[[], str],
        *,
        history: bool,
        keys: Keys | None = None,
        output: Output | None = None,
    ) -> None:
        """words: command -> what may stand behind it, for completion; toolbar: the line below what is typed.

        history: of earlier chats, in the cache folder. keys, output: the terminal, unless a test has its own.
        """
        self._session: PromptSession[str] = PromptSession(
            message=">>> ",
            prompt_continuation="... ",
            multiline=Condition(lambda: is_open(get_app().current_buffer.text)),
            history=_history() if history else None,
            completer=CommandCompleter(words),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
            bottom_toolbar=toolbar,
            input=keys,
            # Answers alone are on stdout: it may be a file.
            output=output or create_output(sys.stderr),
        )

    def read(self) -> str | None:
        """See ChatInput. Ctrl-C at an empty line says how to leave."""
        with suppress(EOFError):
            while (line := self._line()) is None:
                say("Ctrl-D or /exit leaves; Ctrl-C stops an answer")
            return line
        return None

    def _line(self) -> str | None:
        """None: Ctrl-C. Raises EOFError for Ctrl-D, TerminatedError for SIGTERM."""
        try:
            return self._session.prompt()
        except TerminatedError:
            raise
        except KeyboardInterrupt:
            return None


class CommandCompleter(Completer):
    """Offers commands, then what may stand behind each."""

    def __init__(self, words: Mapping[str, Iterable[str]]) -> None:
        """words: command -> what may stand behind it; `FILE` for any file."""
        self._words = words
        self._files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """What may be typed instead of, or behind, what is there."""
        command, space, argument = document.text_before_cursor.partition(" ")
        if not command.startswith("/") or "\n" in command:
            return
        known = list(self._words.get(command, ()) if space else self._words)
        if known == [ANY_FILE]:
            yield from self._files.get_completions(Document(argument), complete_event)
            return
        typed = argument if space else command
        yield from (Completion(each, start_position=-len(typed)) for each in known if each.startswith(typed))


class KeptHistory(FileHistory):
    """A disk that is full does not end the chat."""

    def store_string(self, string: str) -> None:
        """Keep what was typed; a warning where that is not possible."""
        try:
            super().store_string(string)
        except OSError as error:
            _warn(error)


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("c-c")
    def clear_or_interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    @bindings.add("escape", "enter")
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return bindings


def _history() -> History | None:
    """Of earlier chats; None, behind a warning, where it cannot be kept."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Others may not read what somebody asked.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        _warn(error)
        return None
    return KeptHistory(path)


def history_path() -> Path:
    """Where history is kept."""
    return cache_folder() / "chat_history"


def _warn(error: OSError) -> None:
    say(f"warning: {history_path()}: the history cannot be kept: {error.strerror}; --no-history leaves it out")
