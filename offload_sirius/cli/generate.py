"""`offload-sirius generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from offload_sirius.cli import flags, settings
from offload_sirius.cli.flag_group import with_flag_groups
from offload_sirius.cli.prompt import read_prompt
from offload_sirius.cli.tracing import tracing
from offload_sirius.config import EngineConfig, GenerationConfig

if TYPE_CHECKING:
    from offload_sirius.engine import Engine
    from offload_sirius.trace import Tracer

EXAMPLES = """\b
Examples:
  offload-sirius generate --prompt 'Why is the sky blue?'
  offload-sirius generate --model llama-3-70b --device-memory 20GiB --prompt-file question.txt --json
"""


@with_flag_groups
def generate(
    *,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="The prompt. Default: standard input.", metavar="TEXT", rich_help_panel=flags.PROMPT),
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            "--prompt-file",
            help="Read the prompt from a UTF-8 file; - is standard input.",
            metavar="FILE",
            rich_help_panel=flags.PROMPT,
        ),
    ] = None,
    chat: settings.Chat = GenerationConfig.chat,
    engine_config: Annotated[EngineConfig, settings.ENGINE.without("parallel")],
    generation: Annotated[GenerationConfig, settings.GENERATION],
    trace: flags.Trace = None,
    as_json: flags.Json = False,
    verbose: flags.Verbose = False,
) -> int:
    """Answer one prompt, and print the text as it is written."""
    generation = replace(generation, decoding=engine_config.decoding, chat=chat)
    text = read_prompt(prompt, prompt_file)
    with tracing(trace) as tracer:
        return _run(text, engine_config, generation, tracer, as_json=as_json, verbose=verbose)


def _run(
    prompt: str,
    engine_config: EngineConfig,
    generation: GenerationConfig,
    tracer: Tracer | None,
    *,
    as_json: bool,
    verbose: bool,
) -> int:
    # Everything was checked that can be without them: only now the second that torch takes.
    from offload_sirius.cli.console import LoadProgress, say
    from offload_sirius.engine import build, open_model

    model = open_model(engine_config.model)
    prompt_ids = model.encode(prompt, chat=generation.chat)
    if engine_config.max_context is None:
        needed = len(prompt_ids) + generation.max_new_tokens + engine_config.decoding.num_side_nodes
        engine_config = replace(engine_config, max_context=min(needed, model.spec.max_positions))
    else:
        # The engine would say so too, but only after it has loaded.
        model.room_for(len(prompt_ids), generation.max_new_tokens, engine_config.max_context)
    with build(model, engine_config, LoadProgress(), tracer) as engine:
        if engine.rates_problem:
            say(engine.rates_problem)
        if verbose:
            explain(engine, len(prompt_ids))
        return _answer(engine, prompt_ids, generation, as_json=as_json)


def _answer(engine: Engine, prompt_ids: list[int], generation: GenerationConfig, *, as_json: bool) -> int:
    from offload_sirius.cli.app import EXIT_DONE, EXIT_INTERRUPTED
    from offload_sirius.cli.console import TextWriter, advice, say, summary

    writer = None if as_json else TextWriter()
    stream = engine.stream(prompt_ids, generation)
    try:
        for piece in stream:
            if writer is not None:
                writer.write(piece)
    except KeyboardInterrupt:
        stream.interrupt()
    except BaseException:
        if writer is not None:
            writer.end()  # what was written stays, and the error begins a line of its own
        raise
    result = stream.result
    if writer is not None:
        writer.end()
    else:
        sys.stdout.write(json.dumps(result.as_json()) + "\n")
    say(summary(result))
    if (better := advice(result)) is not None:
        say(better)
    return EXIT_INTERRUPTED if result.finish_reason == "interrupted" else EXIT_DONE


def explain(engine: Engine, num_prompt: int) -> None:
    """Say where the weights are, what that takes, and what may be expected of it."""
    from offload_sirius.cli.console import predicted, purpose, say
    from offload_sirius.units import format_size

    plan = engine.plan
    say(
        f"layers: {len(plan.resident_layers)} resident, {len(plan.host_layers)} streamed from host memory, "
        f"{len(plan.disk_layers)} from disk, through {plan.num_slots} slots; {format_size(plan.pass_nbytes)} a pass"
    )
    if plan.hot is not None:
        num_neurons, num_hot = engine.spec.ffn_width, plan.hot.num_hot
        num_drafted = engine.config.decoding.num_drafted(num_neurons, num_hot)
        fewer = f", of which a draft computes {num_drafted}" if num_drafted < num_hot else ""
        layers = f"{len(plan.hot.layers)} of {engine.spec.num_layers} layers"
        if (form := plan.hot.draft_format) is not None:
            say(f"drafts: an {form.kind} copy of attention block and {num_hot} of {num_neurons} neurons of {layers} is resident")
        else:
            say(f"drafts: attention block and {num_hot} of {num_neurons} neurons of {layers} are resident{fewer}")
    for where, bill in (("device", plan.device_bill), ("host", plan.host_bill)):
        say(f"{where}: " + ", ".join(f"{purpose(what)} {format_size(nbytes)}" for what, nbytes in bill.items() if nbytes))
    say(predicted(engine.predict(num_prompt)))
