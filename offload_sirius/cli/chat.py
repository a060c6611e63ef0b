"""`offload-sirius chat`: a conversation in the terminal, or one that comes through a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from offload_sirius.cli import flags
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, SamplingConfig
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

_ENGINE = EngineConfig()
_DECODING = DecodingConfig()
_SAMPLING = SamplingConfig()


def chat(
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
    model: flags.Model = _ENGINE.model,
    mode: flags.Mode = _DECODING.mode,
    sparsity: flags.Sparsity = _DECODING.sparsity,
    keep: flags.Keep = _DECODING.keep,
    cats_threshold: flags.CatsThreshold = None,
    window: flags.Window = str(_DECODING.window),
    accept: flags.Accept = _DECODING.accept,
    threshold: flags.Threshold = _DECODING.threshold,
    draft: flags.Draft = _DECODING.draft,
    draft_quantize: flags.DraftQuantize = _DECODING.draft_quantize,
    resident_first: flags.ResidentFirst = _DECODING.resident_first,
    refresh: flags.Refresh = _DECODING.refresh,
    refresh_decay: flags.RefreshDecay = _DECODING.refresh_decay,
    overlap: flags.Overlap = _DECODING.overlap,
    prior: flags.Prior = _DECODING.prior,
    draft_keep: flags.DraftKeep = _DECODING.draft_keep,
    tree_width: flags.TreeWidth = _DECODING.tree_width,
    lookup: flags.Lookup = None,
    device: flags.Device = _ENGINE.device,
    device_memory: flags.DeviceMemory = _ENGINE.device_memory,
    host_memory: flags.HostMemory = _ENGINE.host_memory,
    link_gbps: flags.LinkGbps = _ENGINE.link_gbps,
    dtype: flags.Dtype = _ENGINE.dtype,
    quantize: flags.Quantize = _ENGINE.quantize,
    quantize_group: flags.QuantizeGroup = _ENGINE.quantize_group,
    quantize_head: flags.QuantizeHead = _ENGINE.quantize_head,
    keep_blocks: flags.KeepBlocks = _ENGINE.keep_blocks,
    max_context: flags.MaxContext = _ENGINE.max_context,
    kv_dtype: flags.KvDtype = _ENGINE.kv_dtype,
    auto: flags.Auto = _ENGINE.auto,
    threads: flags.Threads = _ENGINE.threads,
    cuda_graphs: flags.CudaGraphs = _ENGINE.cuda_graphs,
    max_new_tokens: flags.MaxChatTokens = None,
    stop: flags.Stop = None,
    temperature: flags.Temperature = _SAMPLING.temperature,
    top_k: flags.TopK = _SAMPLING.top_k,
    top_p: flags.TopP = _SAMPLING.top_p,
    min_p: flags.MinP = _SAMPLING.min_p,
    repetition_penalty: flags.RepetitionPenalty = _SAMPLING.repetition_penalty,
    seed: flags.Seed = _SAMPLING.seed,
    verbose: flags.Verbose = False,
) -> int:
    """Talk with a model. Each turn computes its own tokens only; the conversation before it stays in the KV cache.

    A line is a message; /help shows the commands. Ctrl-C stops an answer, Ctrl-D leaves.
    """
    decoding = DecodingConfig(
        mode=mode,  # type: ignore[arg-type]  # checked by DecodingConfig, as are the next
        sparsity=sparsity,  # type: ignore[arg-type]
        keep=keep,
        cats_threshold=cats_threshold,
        window=window,
        accept=accept,  # type: ignore[arg-type]
        threshold=threshold,
        draft=draft,  # type: ignore[arg-type]
        draft_quantize=draft_quantize,  # type: ignore[arg-type]
        resident_first=resident_first,  # type: ignore[arg-type]
        refresh=refresh,
        refresh_decay=refresh_decay,
        overlap=overlap,
        prior=prior,
        draft_keep=draft_keep,
        tree_width=tree_width,
        lookup=lookup,
    )
    engine_config = EngineConfig(
        model=model,
        device=device,
        device_memory=device_memory,
        host_memory=host_memory,
        link_gbps=link_gbps,
        dtype=dtype,  # type: ignore[arg-type]  # checked by EngineConfig
        quantize=quantize,  # type: ignore[arg-type]
        quantize_group=quantize_group,
        quantize_head=quantize_head,  # type: ignore[arg-type]
        keep_blocks=keep_blocks,
        max_context=max_context,
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        auto=auto,
        threads=threads,
        cuda_graphs=cuda_graphs,
        decoding=decoding,
    )
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    generation = GenerationConfig(decoding=decoding, sampling=sampling, stop=tuple(stop or ()))
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
