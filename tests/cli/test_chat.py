"""`offload-sirius chat` on a tiny model with a template: through a pipe, in a terminal, and each of its commands."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from torch import Tensor

import offload_sirius
from offload_sirius.cli.chat import _turn
from offload_sirius.cli.chat_commands import COMMANDS, completions, run_command
from offload_sirius.cli.chat_input import CommandCompleter, TerminalInput
from offload_sirius.cli.chat_session import ChatSession
from offload_sirius.cli.console import TextWriter
from offload_sirius.cli.termination import TerminatedError, Termination
from offload_sirius.config import GenerationConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece, TextStream
from offload_sirius.engine.conversation import Conversation
from offload_sirius.engine.engine import Engine
from offload_sirius.errors import ConfigError, PromptError
from offload_sirius.model.tokenizer import Message
from offload_sirius.model.transformer import Tokens, Transformer

from .conftest import TINY, Pipe, Ran, Run

FEW = ("--device", "cpu", "--threads", "1", "--max-context", "400", "--max-new-tokens", "6")

Chat = Callable[..., Ran]
Prompts = list[list[int]]


@pytest.fixture
def chat(run: Run, pipe: Pipe, chat_directory: Path) -> Chat:
    """Chat with the tiny model: lines, then flags."""

    def chat(lines: str | bytes, *flags: str) -> Ran:
        pipe(lines if isinstance(lines, bytes) else lines.encode())
        return run("chat", "--model", str(chat_directory), *FEW, *flags)

    return chat


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache folder, which is not there yet."""
    return tmp_path / "cache"


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> Prompts:
    """Every prompt that the engine is given."""
    seen: Prompts = []
    stream = Engine.stream

    def watched(self: Engine, prompt: Any, *arguments: Any, **settings: Any) -> Any:
        seen.append(list(prompt))
        return stream(self, prompt, *arguments, **settings)

    monkeypatch.setattr(Engine, "stream", watched)
    return seen


def saved(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_answers_are_on_stdout_and_a_line_of_figures_behind_each_on_stderr(chat: Chat) -> None:
    ran = chat("hello\n\nand?\n", "--mode", "full")
    assert ran.code == 0
    assert ran.out.count("\n") >= 2
    figures = [line for line in ran.err.splitlines() if "positions" in line]
    assert len(figures) == 2
    assert all(re.fullmatch(r"\d+\.\d\d tokens/s, \d+ of 400 positions", line) for line in figures)
    used = [int(line.split()[2]) for line in figures]
    assert used[1] > used[0] + 6


def test_the_line_of_figures_tells_of_drafts_and_of_the_link(chat: Chat) -> None:
    err = chat("hello\n", "--device-memory", "5.3MiB").err
    assert re.search(r"^\d+\.\d\d tokens/s, AAL \d\.\d\d, link \d+% busy, \d+ of 400 positions$", err, re.MULTILINE)


@pytest.mark.parametrize("mode", ["full", "sirius"])
def test_a_turn_computes_its_own_tokens_only(
    mode: str, session: ChatSession, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled: list[int] = []
    prefill = Transformer.prefill_all

    def counted(self: Transformer, prompts: Sequence[Tokens], *arguments: Any) -> Tensor:
        prefilled.append(sum(len(prompt.token_ids) for prompt in prompts))
        return prefill(self, prompts, *arguments)

    monkeypatch.setattr(Transformer, "prefill_all", counted)
    run_command(session, f"/mode {mode}")
    written: list[list[int]] = []
    for content in ("hello", "and?", "well?"):
        session.answer(content)
        assert session.last is not None
        written.append(list(session.last.token_ids))
    assert prompts[1][: len(prompts[0]) + 5] == [*prompts[0], *written[0]]
    assert prompts[2][: len(prompts[1]) + 5] == [*prompts[1], *written[1]]
    # The last token of an answer has not been through the model when it is the last.
    num_new = [len(after) - len(before) - 4 for before, after in pairwise(prompts)]
    assert prefilled[1:] == num_new
    assert session.totals.prompt_tokens - session.totals.cached_tokens == sum(prefilled)


def test_a_saved_chat_goes_on_as_the_same_conversation(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    first = chat(f"hello\n/save {path}\n", "--mode", "full")
    messages = saved(path)["messages"]
    assert messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": first.out.removesuffix("\n")}]
    again = chat(f"/load {path}\n/save {path}\n/retry\n", "--mode", "full")
    assert f"loaded from {path}, turns: 1\n" in again.err
    assert saved(path)["messages"] == messages
    assert again.out == first.out


def test_quotes_hold_several_lines_and_slashes(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    chat(f'"""one\n/two"""\n"""/three"""\n/save {path}\n"""never closed\n')
    assert [each["content"] for each in saved(path)["messages"]][::2] == ["one\n/two", "/three"]


def test_a_wrong_line_is_one_line_of_error_the_chat_goes_on_and_ends_with_2(chat: Chat) -> None:
    ran = chat(b"/sing\n/set volume 3\n/set temperature hot\n/set top_p 7\n\xff\nhello\n", "--mode", "full")
    assert ran.code == 2
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert errors[0] == 'error: there is no command /sing; /help shows all, and between """ and """ it is a message'
    assert errors[1].startswith("error: there is no setting volume; known are accept, ")
    assert errors[2] == "error: temperature cannot be 'hot'; it must be a number"
    assert errors[3] == "error: --top-p is 7.0; it must be above 0 and at most 1"
    assert errors[4].startswith("error: line 5 of standard input: byte 0 is 0xff, not UTF-8")
    assert len(errors) == 5
    assert ran.out


@pytest.fixture(scope="module")
def engine(chat_directory: Path) -> Iterator[Engine]:
    with offload_sirius.load(str(chat_directory), device="cpu", threads=1, max_context=200) as engine:
        yield engine


@pytest.fixture
def session(engine: Engine) -> ChatSession:
    """A chat that has said nothing yet but a system message. Answers have 5 tokens."""
    conversation = Conversation(engine.model.tokenizer, system="Be brief.")
    return ChatSession(engine, conversation, GenerationConfig(), 5)


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("/mode full", "mode full"),
        ("/window 8", "window 8"),
        ("/window auto", "window auto"),
        ("/window", "window auto"),
        ("/set temperature 0.5", "temperature 0.5"),
        ("/set top-k 3", "top_k 3"),
        ("/set lookup off", "lookup off"),
        ("/set lookup none", "lookup none"),
        ("/set cats_threshold none", "cats_threshold none"),
        ("/set stop .", 'stop "."'),
        (r'/set stop "\n"', r'stop "\n"'),
        ("/set stop none", "stop none"),
        ("/set max_new_tokens 3", "max_new_tokens 3"),
        ("/set max_new_tokens none", "max_new_tokens none"),
        ("/set max_new_tokens", "max_new_tokens 5"),
        ("/set", "window auto"),
        ("/system", "Be brief."),
        ("/stats", "no answer yet"),
        ("/reset", "the conversation begins anew, with its system message"),
    ],
)
def test_a_command_shows_what_it_has_set(line: str, shown: str, session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(session, line)
    assert capsys.readouterr().err.splitlines()[-1] == shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set keep 0.7", "the model was loaded with keep 0.5 and is asked for 0.7; load it with that"),
        ("/set max_new_tokens 0", "--max-new-tokens is 0; it must be between 1 and 10,000,000"),
        ("/set lookup maybe", "lookup cannot be 'maybe'; it must be none or on or off"),
        ("/set top_k 1.5", "top_k cannot be '1.5'; it must be a whole number"),
        ('/set stop "', '" is no text in double quotes; write it as in JSON'),
        ("/mode fast", "--mode is fast; it must be one of full, sparse, sirius"),
        ("/window 1", "--window is 1; it must be auto, or 2 or more tokens"),
        ("/save", "/save needs the name of a file"),
        ("/load nowhere", "nowhere: cannot be read: No such file or directory; name one that /save has written"),
        ("/retry", "there is no message to answer again; write one"),
        ("/ hello", "there is no command /; /help shows all"),
    ],
)
def test_a_command_that_cannot_be_done_says_why_and_changes_nothing(line: str, message: str, session: ChatSession) -> None:
    before = (session.config, session.settings())
    with pytest.raises((ConfigError, PromptError)) as caught:
        run_command(session, line)
    assert str(caught.value).startswith(message)
    assert (session.config, session.settings()) == before


def test_two_settings_that_exclude_each_other_are_refused_together(session: ChatSession) -> None:
    run_command(session, "/set accept threshold")
    with pytest.raises(ConfigError, match="--accept threshold is greedy"):
        run_command(session, "/set temperature 1")


def test_help_has_a_line_for_every_command(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(session, "/help")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == list(COMMANDS)
    assert not run_command(session, "/exit")


def test_figures_of_the_last_answer_and_of_all(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.answer("hello")
    session.answer("and?")
    run_command(session, "/stats")
    err = capsys.readouterr().err
    assert re.search(r"^last answer: 5 tokens, first after ", err, re.MULTILINE)
    assert re.search(r"^passes: 1 prompt, \d+ draft, \d+ correction, 0 full; window \d+$", err, re.MULTILINE)
    tokens = r"\d+ tokens of prompts, \d+ of them in the KV cache already, 10 written, 0 B over the link"
    assert re.search(rf"^answers so far: 2, {tokens}$", err, re.MULTILINE)
    assert re.search(r"^memory: device .* planned, host .*$", err, re.MULTILINE)
    assert re.search(r"^context: \d+ of 200 positions, turns: 2$", err, re.MULTILINE)


def test_a_system_message_comes_first_and_can_be_taken_away(session: ChatSession, prompts: Prompts) -> None:
    session.answer("hello")
    run_command(session, "/system Be long.")
    session.answer("hello")
    run_command(session, "/system none")
    session.answer("hello")
    texts = [session.engine.model.tokenizer.decode(each, skip_special_tokens=False) for each in prompts]
    begin = "<|im_start|>system\n"
    assert [text.startswith(begin) for text in texts] == [True, True, False]
    assert texts[1].startswith(begin + "Be long.<|im_end|>")


def test_a_template_that_takes_no_system_message_says_so_at_once(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(messages: Sequence[Message]) -> str:
        if messages[0]["role"] == "system":
            raise PromptError("no system message")
        return "x"

    monkeypatch.setattr(session.conversation, "_tokenizer", SimpleNamespace(render_chat=refuse, encode=lambda *_, **__: [1]))
    session.conversation.system = None
    with pytest.raises(PromptError, match="no system message"):
        run_command(session, "/system Be brief.")
    assert session.conversation.system is None


def test_retry_draws_with_the_next_seed_in_place_of_the_last_answer(session: ChatSession) -> None:
    run_command(session, "/set temperature 2")
    session.answer("hello")
    session.answer("and?")
    first = [turn.answer for turn in session.conversation.turns]
    run_command(session, "/retry")
    second = [turn.answer for turn in session.conversation.turns]
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert session.config.sampling.seed == 1
    run_command(session, "/set seed 0")
    session.conversation.turns.pop()
    session.answer("and?")
    assert [turn.answer for turn in session.conversation.turns] == first


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int, by: int = signal.SIGINT) -> None:
    """A signal when that many pieces have been written, and Ctrl-C while what there is of the answer is kept."""
    written = iter(range(1, 100))
    write, interrupt = TextWriter.write, TextStream.interrupt

    def write_or_interrupt(self: TextWriter, piece: TextPiece) -> None:
        if next(written) == number:
            signal.raise_signal(by)
        write(self, piece)

    def interrupted(self: TextStream) -> Generation:
        signal.raise_signal(signal.SIGINT)
        return interrupt(self)

    monkeypatch.setattr(TextWriter, "write", write_or_interrupt)
    monkeypatch.setattr(TextStream, "interrupt", interrupted)


@pytest.mark.parametrize("mode", ["full", "sirius"])
def test_ctrl_c_stops_the_answer_keeps_it_marked_and_the_chat_goes_on(
    mode: str, session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat.json"
    run_command(session, f"/mode {mode}")
    session.answer("hello")
    (whole,) = session.conversation.turns
    session.reset()
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        session.answer("hello")
    (cut,) = session.conversation.turns
    assert cut.interrupted
    assert cut.answer
    assert whole.answer.startswith(cut.answer)
    assert whole.answer != cut.answer
    assert "interrupted; what was written stays, /retry writes it anew" in capsys.readouterr().err
    session.answer("and?")
    run_command(session, f"/save {path}")
    assert [each.get("interrupted") for each in saved(path)["messages"]] == [None, None, True, None, None]
    session.conversation.turns.pop()
    run_command(session, "/retry")
    assert session.conversation.turns == [whole]
    run_command(session, f"/load {path}")
    assert [turn.interrupted for turn in session.conversation.turns] == [True, False]


def test_ctrl_c_before_anything_was_written_takes_the_message_back_for_retry(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.answer("hello")
    before = list(session.conversation.turns)
    with monkeypatch.context() as patched:
        patched.setattr(Transformer, "prefill_all", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            session.answer("and?")
        assert session.conversation.turns == before
        with pytest.raises(KeyboardInterrupt):
            run_command(session, "/retry")
        assert session.conversation.turns == before
    run_command(session, "/retry")
    assert [turn.question for turn in session.conversation.turns] == ["hello", "and?"]
    with monkeypatch.context() as patched:
        patched.setattr(Transformer, "prefill_all", lambda *_: signal.raise_signal(signal.SIGINT))
        both = list(session.conversation.turns)
        with pytest.raises(KeyboardInterrupt):
            run_command(session, "/retry")
        assert session.conversation.turns == both, "an answer that could not be written anew stays"


def test_a_full_context_is_one_line_and_nothing_is_lost(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(session, "/set max_new_tokens none")
    session.answer("hello")
    assert session.last is not None
    assert session.last.prompt_tokens + session.last.new_tokens == 201
    err = capsys.readouterr().err
    assert (
        "the context of 200 positions is full; begin anew with /reset (/save FILE keeps what was said), or start with "
        "--max-context N, at most 2048\n"
    ) in err
    assert err.endswith(", 200 of 200 positions\n")
    turns = list(session.conversation.turns)
    with pytest.raises(
        PromptError, match=r"the conversation takes \d+ positions with this message, 200 were planned for; shorten"
    ):
        session.answer("and?")
    assert session.conversation.turns == turns
    run_command(session, "/reset")
    session.answer("hello")
    assert session.conversation.turns == turns


def test_an_answer_cut_by_its_limit_says_so(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    session.answer("hello")
    assert "cut at 5 tokens; /set max_new_tokens none lets answers end by themselves\n" in capsys.readouterr().err


def test_a_saved_chat_is_written_over_but_no_other_file(session: ChatSession, tmp_path: Path) -> None:
    chat, other = tmp_path / "chat.json", tmp_path / "other"
    run_command(session, f"/save {chat}")
    session.answer("hello")
    run_command(session, f"/save {chat}")
    assert len(saved(chat)["messages"]) == 3
    other.write_text("dear diary")
    with pytest.raises(ConfigError, match="is no saved chat: not JSON in UTF-8; which is not written over; name another file"):
        run_command(session, f"/save {other}")
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        run_command(session, f"/save {tmp_path}/nowhere/chat.json")
    assert sorted(tmp_path.glob("*.*")) == [chat], "no half file beside it"
    assert other.read_text() == "dear diary"


def test_loading_takes_settings_along_but_not_a_mode_that_was_not_planned_for(
    chat_directory: Path, session: ChatSession, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "chat.json"
    for line in ("/set temperature 0.5", "/set stop x", "/set max_new_tokens none", "/mode sirius", "/window 8"):
        run_command(session, line)
    kept = session.settings()
    run_command(session, f"/save {path}")
    for line in ("/set temperature 1", "/set stop none", "/set max_new_tokens 3", "/mode full", "/system none", f"/load {path}"):
        run_command(session, line)
    assert session.settings() == kept
    assert session.conversation.system == "Be brief."
    with offload_sirius.load(str(chat_directory), device="cpu", threads=1, max_context=100, mode="full") as engine:
        other = ChatSession(engine, Conversation(engine.model.tokenizer), GenerationConfig())
        run_command(other, f"/load {path}")
        assert (other.settings()["mode"], other.settings()["temperature"]) == ("full", 0.5)
    assert "loaded with mode full and is asked for mode sirius; load it with that mode; going on with mode full" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is no saved chat: not JSON in UTF-8"),
        (b"[" * 100_000, "is no saved chat: not JSON in UTF-8"),
        (b"[]", 'is no saved chat: "format" is not "offload-sirius chat 1"'),
        ({"settings": 1}, 'is no saved chat: "settings" must be an object and "messages" a list'),
        ({"messages": ["hello"]}, 'is no saved chat: message 1 must have "role" and "content", both text'),
        ({"messages": [{"role": "user", "content": 1}]}, 'is no saved chat: message 1 must have "role"'),
        ({"messages": [{"role": "user", "content": "hi"}]}, "is no saved chat: the last message is the user's"),
        ({"settings": {"volume": 3}}, "there is no setting volume"),
        ({"settings": {"seed": 1.5}}, "seed cannot be '1.5'; it must be a whole number"),
        ({"settings": {"seed": -1}}, "--seed is -1; it must be between 0 and"),
        ({"settings": {"stop": [1]}}, "stop cannot be [1]; it must be a single value"),
        ({"settings": {"top_p": {}}}, "top_p cannot be {}; it must be a single value"),
    ],
)
def test_a_file_that_is_no_saved_chat_changes_nothing(
    content: bytes | dict[str, Any], message: str, session: ChatSession, tmp_path: Path
) -> None:
    path = tmp_path / "chat.json"
    whole = {"format": "offload-sirius chat 1", "model": "x", "settings": {}, "messages": []}
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(whole | content).encode())
    session.answer("hello")
    before = (session.config, session.settings(), session.conversation.messages())
    with pytest.raises(ConfigError) as caught:
        run_command(session, f"/load {path}")
    assert str(caught.value).startswith(f"{path}: {message}")
    assert (session.config, session.settings(), session.conversation.messages()) == before


def test_a_model_without_a_template_is_refused_before_it_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius.engine.build", lambda *_: pytest.fail("loaded"))
    ran = run("chat", *TINY)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "error: synthetic:tiny?dtype=F32 has no chat template, it was not trained for conversations; "
        "use offload-sirius generate, which gives it a prompt as it is\n"
    )


def test_without_standard_input_there_is_no_chat(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, run: Run, chat_directory: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    ran = run("chat", "--model", str(chat_directory), *FEW)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: there is no standard input; start the chat in a terminal")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_piped_chat_behind_what_was_written(
    number: int, code: int, chat: Chat, prompts: Prompts, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = chat("hello\n").out
    prompts.clear()
    interrupt_at(monkeypatch, 5, number)
    ran = chat("hello\nwhat\n")
    assert ran.code == code
    assert ran.out.endswith("\n")
    assert whole.startswith(ran.out.removesuffix("\n"))
    assert len(ran.out) > 1
    assert len(prompts) == 1
    assert "Traceback" not in ran.err


def test_sigterm_ends_a_chat_in_a_terminal_while_it_writes_and_while_it_waits(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def terminated(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(TextWriter, "write", terminated)
    with Termination(), pytest.raises(TerminatedError):
        _turn(session, SimpleNamespace(read=lambda: "hello"), interactive=True)
    with create_pipe_input() as keys:
        terminal = TerminalInput({}, lambda: "", history=False, keys=keys, output=DummyOutput())
        monkeypatch.setattr(terminal._session, "prompt", terminated)
        with Termination(), pytest.raises(TerminatedError):
            _turn(session, terminal, interactive=True)


@pytest.mark.parametrize("interactive", [False, True])
def test_ctrl_c_beside_an_answer_ends_the_program_only_where_nobody_types(
    interactive: bool, session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ChatSession, "answer", lambda *_: signal.raise_signal(signal.SIGINT))
    source = SimpleNamespace(read=lambda: "hello")
    if interactive:
        assert _turn(session, source, interactive=True)
    else:
        with pytest.raises(KeyboardInterrupt):
            _turn(session, source, interactive=False)


@pytest.fixture
def typed(cache: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., list[str | None]]]:
    """What a terminal gives for these keys, up to the end of input."""
    with create_pipe_input() as keys:

        def typed(text: str, history: bool = True) -> list[str | None]:
            terminal = TerminalInput(completions(), lambda: "", history=history, keys=keys, output=DummyOutput())
            keys.send_text(text + "\x04")
            lines: list[str | None] = []
            while not lines or lines[-1] is not None:
                lines.append(terminal.read())
            return lines[:-1]

        yield typed


CTRL_C, ALT_ENTER = "\x03", "\x1b\r"


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ("hello\rand?\r", ["hello", "and?"]),
        ("hallo\x1b[D\x1b[D\x1b[D\x7fe\r", ["hello"]),
        ('"""one\rtwo"""\r', ['"""one\ntwo"""']),
        (f"one{ALT_ENTER}two\r", ["one\ntwo"]),
        (f"a mistake{CTRL_C}hello\r", ["hello"]),
    ],
)
def test_a_terminal_has_editing(keys: str, lines: list[str], typed: Callable[..., list[str | None]]) -> None:
    assert typed(keys) == lines


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("/s", ["/system", "/set", "/stats", "/save"]),
        ("/mode s", ["sparse", "sirius"]),
        ("/set temp", ["temperature"]),
        ("/load FOLDER/ch", ["at.json"]),
        ("/sing ", []),
        ("hello /s", []),
        ("/set\ntemp", []),
        ("", []),
    ],
)
def test_commands_are_completed(typed: str, offered: list[str], tmp_path: Path) -> None:
    (tmp_path / "chat.json").touch()
    document = Document(typed.replace("FOLDER", str(tmp_path)))
    found = CommandCompleter(completions()).get_completions(document, CompleteEvent())
    assert [each.text for each in found] == offered


def test_ctrl_c_at_an_empty_line_says_how_to_leave(
    typed: Callable[..., list[str | None]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(f"{CTRL_C}hello\r") == ["hello"]
    assert capsys.readouterr().err == "Ctrl-D or /exit leaves; Ctrl-C stops an answer\n"


def test_history_is_kept_for_the_next_chat_for_its_owner_only_unless_told_otherwise(
    typed: Callable[..., list[str | None]], cache: Path
) -> None:
    assert typed("secret\r", False) == ["secret"]
    assert not cache.exists()
    typed('"""one\rtwo"""\r')
    assert stat.S_IMODE((cache / "chat_history").stat().st_mode) == 0o600
    assert list(FileHistory(cache / "chat_history").load_history_strings()) == ['"""one\ntwo"""']
    assert b"secret" not in (cache / "chat_history").read_bytes()


def test_a_cache_folder_that_cannot_be_written_costs_the_history_only(
    typed: Callable[..., list[str | None]], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file")
    assert typed("hello\r") == ["hello"]
    assert capsys.readouterr().err == (
        f"warning: {cache}/chat_history: the history cannot be kept: File exists; --no-history leaves it out\n"
    )


def test_in_a_real_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(chat_directory: Path, tmp_path: Path) -> None:
    """The whole program: what is typed and figures on the terminal, answers alone in the file that stdout is."""
    flags = (*FEW[:-2], "--mode", "full", "--device-memory", "5.3MiB", "--link-gbps", "0.01")
    command = (sys.executable, "-m", "offload_sirius", "chat", "--model", str(chat_directory), *flags)
    ours, theirs = pty.openpty()
    answers = tmp_path / "answers"
    with answers.open("wb") as out:
        process = subprocess.Popen(command, stdin=theirs, stdout=out, stderr=theirs, start_new_session=True)
    os.close(theirs)
    screen = bytearray()

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not what():
            assert time.monotonic() < deadline, screen.decode(errors="replace")
            assert process.poll() is None, screen.decode(errors="replace")
            if select.select([ours], [], [], 0.05)[0]:
                with suppress(OSError):  # the program has ended
                    screen.extend(os.read(ours, 4096))

    try:
        wait_for(lambda: b">>>" in screen)
        os.write(ours, b"hello\r")
        wait_for(lambda: answers.stat().st_size > 0)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: b"interrupted; what was written stays" in screen)
        wait_for(lambda: b"of 400 positions" in screen)
        screen.clear()
        wait_for(lambda: b">>>" in screen)
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert answers.read_bytes().endswith(b"\n")
    assert b">>>" not in answers.read_bytes()
