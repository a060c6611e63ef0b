"""`offload-sirius chat`: a conversation in the terminal, or one that comes through a pipe."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from offload_sirius.cli import flags, settings
from offload_sirius.cli.flag_group import with_flag_groups
from offload_sirius.config import EngineConfig, GenerationConfig, help_of
from offload_sirius.errors import USER_ERRORS, ConfigError

if TYPE_CHECKING:
    from offload_sirius.cli.chat_input import ChatInput
    from offload_sirius.cli.chat_session import ChatSession
    from offload_sirius.engine.conversation import Conversation
    from offload_sirius.engine.opened import Model

EXAMPLES = """\b
Examples:
  offload-sirius chat
  offload-sirius chat --model llama-3-8b --device-memory 6GiB --system 'Answer in one sentence.' --temperature 0.7
"""


@with_flag_groups
def chat(
    *,
    system: Annotated[
        str | None,
        typer.Option("--system", help="A system message, before all others.", metavar="TEXT", rich_help_panel=flags.PROMPT),
    ] = None,
    history: Annotated[
        bool,
        typer.Option(
            "--history/--no-history",
            help="Keep what is typed for the next chat, in the cache folder.",
            rich_help_panel=flags.PROMPT,
        ),
    ] = True,
    engine_config: Annotated[EngineConfig, settings.ENGINE.without("parallel", "shared_host_buffers")],
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            help=help_of(GenerationConfig, "max_new_tokens") + " Default: what the context has room for.",
            metavar="N",
            rich_help_panel=flags.DECODING,
        ),
    ] = None,
    generation: Annotated[GenerationConfig, settings.GENERATION.without("ignore_eos")],
    verbose: flags.Verbose = False,
) -> int:
    """Talk with a model. Each turn computes its own tokens only; the conversation before it stays in the KV cache.

    A line is a message; /help shows the commands. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    generation = replace(generation, decoding=engine_config.decoding)
    if max_new_tokens is not None:
        GenerationConfig(max_new_tokens=max_new_tokens)  # raises for a number out of range
    # Everything was checked that can be without them: only now the second that torch takes.
    from offload_sirius.cli.chat_session import ChatSession
    from offload_sirius.cli.console import LoadProgress, say
    from offload_sirius.cli.generate import explain
    from offload_sirius.engine import build, open_model

    opened = open_model(engine_config.model)
    conversation = _conversation(opened, system)
    with build(opened, engine_config, LoadProgress()) as engine:
        if engine.rates_problem:
            say(engine.rates_problem)
        if verbose:
            explain(engine, len(conversation.ask("?").token_ids))
        session = ChatSession(engine, conversation, generation, max_new_tokens)
        return _talk(session, history=history)


def _conversation(model: Model, system: str | None) -> Conversation:
    """An empty one. Raises ConfigError or PromptError, before anything is loaded, where the model cannot have it."""
    from offload_sirius.engine.conversation import Conversation

    if not model.tokenizer.has_chat_template:
        raise ConfigError(
            f"{model.spec.name} has no chat template, it was not trained for conversations; use offload-sirius generate, "
            "which gives it a prompt as it is"
        )
    conversation = Conversation(model.tokenizer, system=system)
    conversation.ask("?")
    return conversation


def _talk(session: ChatSession, *, history: bool) -> int:
    """One line after the other. A pipe's wrong lines make the exit code 2; in a terminal they have been seen."""
    from offload_sirius.cli.app import EXIT_DONE, EXIT_WRONG_USE
    from offload_sirius.cli.chat_input import PlainInput

    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    source: ChatInput = _terminal(session, history=history) if interactive else PlainInput()
    code = EXIT_DONE
    while (went_well := _turn(session, source, interactive=interactive)) is not None:
        if not went_well and not interactive:
            code = EXIT_WRONG_USE
    return code


def _turn(session: ChatSession, source: ChatInput, *, interactive: bool) -> bool | None:
    """Do what the next line says: whether that went well; None where it is to leave."""
    from offload_sirius.cli.console import say
    from offload_sirius.cli.termination import TerminatedError

    try:
        line = source.read()
        return True if line is not None and _obey(session, line) else None
    except USER_ERRORS as error:
        say("error: " + " ".join(str(error).split()))
        return False
    except KeyboardInterrupt as error:
        # It has ended an answer. Where nobody is there to write the next line it ends the program.
        if not interactive or isinstance(error, TerminatedError):
            raise
        return True


def _obey(session: ChatSession, line: str) -> bool:
    """Do what a line says; False where it is to leave."""
    from offload_sirius.cli.chat_commands import run_command
    from offload_sirius.cli.chat_input import unquoted

    if line.startswith("/"):
        return run_command(session, line)
    if (content := unquoted(line)).strip():
        session.answer(content)
    return True


def _terminal(session: ChatSession, *, history: bool) -> ChatInput:
    from offload_sirius.cli.chat_commands import completions
    from offload_sirius.cli.chat_input import TerminalInput
    from offload_sirius.cli.console import say

    def toolbar() -> str:
        decoding = session.config.decoding or session.engine.config.decoding
        window = f", window {decoding.window}" if decoding.mode == "sirius" else ""
        used = f"{session.positions} of {session.engine.context} positions"
        return f"{session.engine.spec.name}: mode {decoding.mode}{window}, {used}"

    say("/help shows the commands, Ctrl-D leaves")
    return TerminalInput(completions(), toolbar, history=history)
