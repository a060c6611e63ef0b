"""`offload-sirius generate`: one prompt, one answer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from offload_sirius.cli import flags
from offload_sirius.cli.prompt import read_prompt
from offload_sirius.cli.tracing import tracing
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, SamplingConfig

if TYPE_CHECKING:
    from offload_sirius.engine import Engine
    from offload_sirius.trace import Tracer

EXAMPLES = """\b
Examples:
  offload-sirius generate --prompt 'Why is the sky blue?'
  offload-sirius generate --model llama-3-70b --device-memory 20GiB --prompt-file question.txt --json
"""

_ENGINE = EngineConfig()
_DECODING = DecodingConfig()
_GENERATION = GenerationConfig()
_SAMPLING = SamplingConfig()


def generate(
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
    chat: flags.Chat = _GENERATION.chat,
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
    shared_host_buffers: flags.SharedHostBuffers = _ENGINE.shared_host_buffers,
    max_new_tokens: flags.MaxNewTokens = _GENERATION.max_new_tokens,
    stop: flags.Stop = None,
    ignore_eos: flags.IgnoreEos = _GENERATION.ignore_eos,
    temperature: flags.Temperature = _SAMPLING.temperature,
    top_k: flags.TopK = _SAMPLING.top_k,
    top_p: flags.TopP = _SAMPLING.top_p,
    min_p: flags.MinP = _SAMPLING.min_p,
    repetition_penalty: flags.RepetitionPenalty = _SAMPLING.repetition_penalty,
    seed: flags.Seed = _SAMPLING.seed,
    trace: flags.Trace = None,
    as_json: flags.Json = False,
    verbose: flags.Verbose = False,
) -> int:
    """Answer one prompt, and print the text as it is written."""
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
        shared_host_buffers=shared_host_buffers,
        decoding=decoding,
    )
    sampling = SamplingConfig(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed
    )
    generation = GenerationConfig(
        decoding=decoding,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        chat=chat,
    )
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
    from dataclasses import replace

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
