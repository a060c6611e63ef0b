"""What a line that begins with a slash does to a chat: one function a command, all of them in the table at the end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_sirius.cli.chat_file import load_chat, save_chat
from offload_sirius.cli.chat_input import ANY_FILE
from offload_sirius.cli.chat_session import SAVED_DECODING, ChatSession
from offload_sirius.cli.console import say, summary
from offload_sirius.cli.setting_text import NONE, parse_value, require_settable, settable, shown
from offload_sirius.config import AUTO, MODES
from offload_sirius.errors import ConfigError
from offload_sirius.units import format_size


@dataclass(frozen=True, kw_only=True)
class Command:
    """One of them."""

    arguments: str
    """As /help shows them."""
    help: str
    run: Callable[[ChatSession, str], None] | None
    """None: it leaves."""
    words: Iterable[str] = ()
    """What may stand behind it, for completion."""


def run_command(session: ChatSession, line: str) -> bool:
    """Do what the line says; False where it is to leave. Raises ConfigError or PromptError with one line."""
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise ConfigError(f'there is no command {name}; /help shows all, and between """ and """ it is a message')
    if command.run is None:
        return False
    command.run(session, argument.strip())
    return True


def completions() -> dict[str, Iterable[str]]:
    """Command -> what may stand behind it; `FILE` for any file."""
    return {name: command.words for name, command in COMMANDS.items()}


def _system(session: ChatSession, text: str) -> None:
    if not text:
        say(session.conversation.system or "there is no system message")
        return
    session.set_system(None if text == NONE else text)


def _mode(session: ChatSession, mode: str) -> None:
    _change(session, "mode", mode)


def _window(session: ChatSession, window: str) -> None:
    _change(session, "window", window)


def _set(session: ChatSession, argument: str) -> None:
    name, _, text = argument.partition(" ")
    _change(session, name.replace("-", "_"), text.strip())


def _change(session: ChatSession, name: str, text: str) -> None:
    """Set it; without a value, show it, or all."""
    if not name:
        for each in settable():
            say(_shown(session, each))
        return
    require_settable(name)
    if text:
        session.change(**{name: parse_value(name, text)})
    say(_shown(session, name))


def _shown(session: ChatSession, name: str) -> str:
    if name == "max_new_tokens":
        return shown(name, session.max_new_tokens)
    decoding = session.config.decoding or session.engine.config.decoding
    home = next(each for each in (session.config.sampling, decoding, session.config) if hasattr(each, name))
    return shown(name, getattr(home, name))


def _stats(session: ChatSession, _: str) -> None:
    if session.last is None:
        say("no answer yet")
        return
    result, totals, passes = session.last, session.totals, session.last.passes
    say(f"last answer: {summary(result)}")
    say(
        f"passes: {passes.prefill} prompt, {passes.draft} draft, {passes.correction} correction, {passes.full} full; "
        f"window {result.window or 'none'}"
    )
    say(
        f"answers so far: {totals.answers}, {totals.prompt_tokens} tokens of prompts, {totals.cached_tokens} of them in the KV "
        f"cache already, {totals.new_tokens} written, "
        f"{format_size(totals.copied_bytes)} over the link"
    )
    memory = result.memory
    say(
        f"memory: device {format_size(memory.device_peak_bytes)} of {format_size(memory.device_plan_bytes)} planned, "
        f"host {format_size(memory.host_peak_bytes)}"
    )
    say(f"context: {session.positions} of {session.engine.context} positions, turns: {len(session.conversation.turns)}")


def _save(session: ChatSession, name: str) -> None:
    path = _file(name, "/save")
    save_chat(path, session.engine.spec.name, session.conversation, session.settings())
    say(f"saved to {path}")


def _load(session: ChatSession, name: str) -> None:
    path = _file(name, "/load")
    saved = load_chat(path)
    settings = {each: _checked(path, each, value) for each, value in saved.settings.items()}
    decoding = {each: settings.pop(each) for each in SAVED_DECODING if each in settings}
    before = session.conversation.system
    session.set_system(saved.system)
    try:
        session.change(**settings)
    except ConfigError as error:
        session.conversation.system = before
        raise ConfigError(f"{path}: {error}") from error
    try:
        session.change(**decoding)
    except ConfigError as error:
        say(f"warning: {path}: {error}; going on with {_shown(session, 'mode')}, {_shown(session, 'window')}")
    session.reset()
    session.conversation.turns[:] = saved.turns
    say(f"loaded from {path}, turns: {len(saved.turns)}")


def _checked(path: Path, name: str, value: Any) -> Any:
    """A setting as a file has it, as /set would take it. Raises ConfigError."""
    if name == "stop" and isinstance(value, list) and all(isinstance(each, str) for each in value):
        return tuple(value)
    if isinstance(value, list | dict):
        raise ConfigError(f"{path}: {name} cannot be {json.dumps(value)}; it must be a single value")
    try:
        return parse_value(name, value if isinstance(value, str) else NONE if value is None else json.dumps(value))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _file(name: str, command: str) -> Path:
    if not name:
        raise ConfigError(f"{command} needs the name of a file")
    return Path(name).expanduser()


def _reset(session: ChatSession, _: str) -> None:
    session.reset()
    say("the conversation begins anew" + (", with its system message" if session.conversation.system else ""))


def _retry(session: ChatSession, _: str) -> None:
    session.retry()


def _help(session: ChatSession, _: str) -> None:
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        say(f"  {f'{name} {command.arguments}':<{width}}  {command.help}")
    say('Between """ and """ a message may have several lines. Ctrl-C stops an answer, Ctrl-D leaves.')


COMMANDS: dict[str, Command] = {
    "/system": Command(arguments="TEXT", help="Give the model a system message; none takes it away.", run=_system),
    "/mode": Command(arguments="|".join(MODES), help="How answers are decoded.", run=_mode, words=MODES),
    "/window": Command(arguments=f"N|{AUTO}", help="Tokens that a correction verifies.", run=_window, words=(AUTO,)),
    "/set": Command(
        arguments="NAME VALUE",
        help="Change a setting, such as temperature; without VALUE, show it.",
        run=_set,
        words=settable(),
    ),
    "/stats": Command(arguments="", help="Figures of the last answer and of the chat.", run=_stats),
    "/save": Command(arguments="FILE", help="Write messages and settings.", run=_save, words=(ANY_FILE,)),
    "/load": Command(arguments="FILE", help="Go on with a saved chat.", run=_load, words=(ANY_FILE,)),
    "/reset": Command(arguments="", help="Forget the conversation; the system message stays.", run=_reset),
    "/retry": Command(arguments="", help="Answer the last message again, with the next seed where it is drawn.", run=_retry),
    "/help": Command(arguments="", help="Show this.", run=_help),
    "/exit": Command(arguments="", help="Leave; so does Ctrl-D.", run=None),
}
