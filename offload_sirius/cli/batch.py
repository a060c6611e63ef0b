"""`offload-sirius batch`: a file of prompts, a file of answers."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_sirius.batch.lines import Input, read_input
from offload_sirius.batch.results import Results, read_finished
from offload_sirius.cli import flags
from offload_sirius.config import AUTO, DecodingConfig, EngineConfig, GenerationConfig, SamplingConfig, help_of
from offload_sirius.errors import ConfigError
from offload_sirius.files import require_writable

if TYPE_CHECKING:
    from offload_sirius.batch.processes import Processes

EXAMPLES = """\b
Examples:
  offload-sirius batch --in prompts.jsonl --out answers.jsonl
  offload-sirius batch --model llama-3-8b --device-memory 6GiB --in prompts.jsonl --out answers.jsonl --parallel 16
"""

BATCH = "Batch"
EXIT_SOME_ERRORS = 1
"""All is done, and some lines could not be answered."""

_ENGINE = EngineConfig()
_DECODING = DecodingConfig()
_GENERATION = GenerationConfig()
_SAMPLING = SamplingConfig()

PLACES = frozenset(
    ("device", "device_memory", "host_memory", "link_gbps", "threads", "parallel", "cuda_graphs", "shared_host_buffers")
)
"""Settings of the engine that exact answers do not depend on: a run may go on with others."""


def batch(
    source: Annotated[
        str | None,
        typer.Option(
            "--in",
            help='Prompts: a JSON object a line, with "prompt" or "messages", and maybe "id" and settings of the answer, such as '
            '"max_tokens", "temperature", "seed", "stop".',
            metavar="FILE",
            rich_help_panel=BATCH,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Answers: a JSON object a line, in the same order. One that was not finished is completed.",
            metavar="FILE",
            rich_help_panel=BATCH,
        ),
    ] = None,
    parallel: Annotated[
        str,
        typer.Option(
            "--parallel",
            help=help_of(EngineConfig, "parallel") + " auto: as many as are predicted to give the most tokens a second together.",
            metavar="N|auto",
            rich_help_panel=BATCH,
        ),
    ] = AUTO,
    figures: Annotated[
        bool,
        typer.Option(
            "--figures",
            help="Add each answer's figures, such as times and acceptance, which differ from run to run.",
            rich_help_panel=BATCH,
        ),
    ] = False,
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
    verbose: flags.Verbose = False,
) -> int:
    """Answer a file of prompts, several at once, in order; the same command goes on where it was interrupted or killed.

    Settings of answers that are given here hold where a line says nothing. Exit status 1: all is done, but lines that cannot be
    answered, as they are too long, have an "error". On several GPUs or machines: accelerate launch -m offload_sirius batch ...
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
        parallel=_ENGINE.parallel if parallel == AUTO else _number(parallel),
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
    source_path, out_path = _files(source, out)
    asked = read_input(source_path, generation)
    return _run(asked, out_path, engine_config, generation, chooses=parallel == AUTO, figures=figures, verbose=verbose)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"--parallel is {text}; it must be auto or a number of answers")
    return int(text[:9])


def _files(source: str | None, out: str | None) -> tuple[Path, Path]:
    if source is None or out is None:
        raise ConfigError(f"{'--in' if source is None else '--out'} is not given; give --in FILE and --out FILE")
    source_path, out_path = Path(source), Path(out)
    require_writable(out_path, "--out")
    if out_path.exists() and not out_path.is_file():
        raise ConfigError(f"--out {out}: is no file that a run could go on with; name a file")
    if out_path.exists() and source_path.exists() and out_path.samefile(source_path):
        raise ConfigError(f"--out {out}: is --in, too; name another file")
    return source_path, out_path


def _asked_for(asked: Input, engine_config: EngineConfig, generation: GenerationConfig, *, figures: bool) -> dict[str, Any]:
    """What answers depend on, as plain values: what a run that goes on must have in common with the one before."""
    engine = {name: value for name, value in asdict(engine_config).items() if name not in PLACES}
    sampling = asdict(generation.sampling)
    own = {name: value for name, value in asdict(generation).items() if name not in ("decoding", "sampling")}
    decoding: dict[str, Any] = engine.pop("decoding")
    return {"input": asked.digest, "figures": figures} | engine | decoding | own | sampling | {"stop": list(generation.stop)}


def _run(
    asked: Input,
    out: Path,
    engine_config: EngineConfig,
    generation: GenerationConfig,
    *,
    chooses: bool,
    figures: bool,
    verbose: bool,
) -> int:
    from offload_sirius.cli.app import EXIT_DONE, EXIT_INTERRUPTED
    from offload_sirius.cli.console import say

    ids = [line.id for line in asked.lines]
    settings = _asked_for(asked, engine_config, generation, figures=figures)
    finished = read_finished(out, ids, settings)
    if finished.num_written == len(ids):
        say(f"{out}: has the answers to all {len(ids)} prompts already{_errors(finished.num_errors)}")
        return EXIT_SOME_ERRORS if finished.num_errors else EXIT_DONE

    from offload_sirius.batch.processes import is_left_alone, join

    if is_left_alone():
        say(
            "warning: accelerate starts one process on CPUs, however many it is asked for, unless it has --mpirun_hostfile; "
            "launch with --multi_gpu in place of --cpu, and give batch --device cpu"
        )
    left = [(place, line) for place, line in enumerate(asked.lines) if not finished.has(place)]
    processes = join(engine_config)
    if finished.num_done and processes.index == 0:
        say(f"{out}: {finished.num_done} of {len(ids)} prompts are answered; going on")
    processes.wait()  # all have read what there is, before the first of them writes
    results = Results(out, ids, settings, processes.index)
    try:
        _answer(processes, left, results, engine_config, chooses=chooses, figures=figures, verbose=verbose)
        processes.wait()
        if processes.index == 0:
            results.complete()
    except KeyboardInterrupt:
        say(f"{results.num_done} of {len(ids)} prompts are answered; the same command goes on")
        return EXIT_INTERRUPTED
    finally:
        results.close()
    processes.leave()
    if processes.index != 0:
        return EXIT_DONE
    say(f"{out}: {len(ids)} answers{_errors(results.num_errors)}")
    return EXIT_SOME_ERRORS if results.num_errors else EXIT_DONE


def _errors(number: int) -> str:
    return f", of which {number} are errors: those lines say why" if number else ""


def _answer(
    processes: Processes,
    left: list[Any],
    results: Results,
    engine_config: EngineConfig,
    *,
    chooses: bool,
    figures: bool,
    verbose: bool,
) -> None:
    """This process's share of the prompts that are left."""
    # Everything was checked that can be without them: only now the second that torch takes.
    from offload_sirius.batch.answering import answer_all, answerable, fastest_parallel, refused
    from offload_sirius.cli.console import LoadProgress, say
    from offload_sirius.cli.generate import explain
    from offload_sirius.engine import build, open_model

    model = open_model(engine_config.model)
    share = processes.share(left)
    able, errors, needed = answerable(model, share, engine_config.max_context)
    for place, line in share:
        if place in errors:
            results.add(place, refused(line.id, errors[place]))
    if not able:
        return
    if engine_config.max_context is None:
        context = min(needed + engine_config.decoding.num_side_nodes, model.spec.max_positions)
        engine_config = replace(engine_config, max_context=context)
    engine_config = processes.placed(engine_config)
    if chooses:
        engine_config = replace(engine_config, parallel=fastest_parallel(model, engine_config, len(able)))
    with build(model, engine_config, LoadProgress()) as engine:
        if engine.rates_problem:
            say(engine.rates_problem)
        if verbose:
            explain(engine, 1)
        of_processes = f", by one of {processes.count} processes" if processes.count > 1 else ""
        say(f"{len(able)} prompts, {engine_config.parallel} at once{of_processes}")
        progress = AnswerProgress(len(able))

        def on_answer(place: int, answer: dict[str, Any]) -> None:
            results.add(place, answer)
            progress.advance(answer.get("usage", {}).get("completion_tokens", 0))

        try:
            answer_all(engine.batch(), able, on_answer, figures=figures)
        finally:
            progress.end()


class AnswerProgress:
    """Answers, their tokens a second and the time left: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int) -> None:
        """total: prompts that are to be answered."""
        import sys

        self._total, self._num_done, self._num_tokens = total, 0, 0
        self._began = self._said = time.perf_counter()
        self._bar: Any = _bar(total) if sys.stderr.isatty() else None

    def advance(self, num_tokens: int) -> None:
        """One more is there, of so many tokens."""
        from offload_sirius.cli.console import PLAIN_PROGRESS_SECONDS, say

        self._num_done += 1
        self._num_tokens += num_tokens
        now = time.perf_counter()
        rate = self._num_tokens / (now - self._began)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, rate=f"{rate:.1f} tokens/s")
        elif now - self._said > PLAIN_PROGRESS_SECONDS:
            self._said = now
            left = (self._total - self._num_done) * (now - self._began) / self._num_done
            say(f"{self._num_done} of {self._total} prompts answered, {rate:.1f} tokens/s, {left:.0f} s left")

    def end(self) -> None:
        """No more will come."""
        if self._bar is not None:
            self._bar.stop()


def _bar(total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("prompts answered, {task.fields[rate]}"), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task("answering", total=total, rate="")
    bar.start()
    return bar
