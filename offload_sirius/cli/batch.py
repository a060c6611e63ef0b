"""`offload-sirius batch`: a file of prompts, a file of answers."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_sirius.batch.lines import Input, read_input
from offload_sirius.batch.results import Results, read_finished
from offload_sirius.cli import flags, settings
from offload_sirius.cli.flag_group import with_flag_groups
from offload_sirius.config import AUTO, EngineConfig, GenerationConfig, help_of
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

PLACES = frozenset(
    ("device", "device_memory", "host_memory", "link_gbps", "threads", "parallel", "cuda_graphs", "shared_host_buffers")
)
"""Settings of the engine that exact answers do not depend on: a run may go on with others."""


@with_flag_groups
def batch(
    *,
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
    chat: settings.Chat = GenerationConfig.chat,
    engine_config: Annotated[EngineConfig, settings.ENGINE],
    generation: Annotated[GenerationConfig, settings.GENERATION],
    verbose: flags.Verbose = False,
) -> int:
    """Answer a file of prompts, several at once, in order; the same command goes on where it was interrupted or killed.

    Settings of answers that are given here hold where a line says nothing. Exit status 1: all is done, but lines that cannot be
    answered, as they are too long, have an "error". On several GPUs or machines: accelerate launch -m offload_sirius batch ...
    """
    if parallel != AUTO:
        engine_config = replace(engine_config, parallel=_number(parallel))
    generation = replace(generation, decoding=engine_config.decoding, chat=chat)
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
    asked_for = _asked_for(asked, engine_config, generation, figures=figures)
    finished = read_finished(out, ids, asked_for)
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
    results = Results(out, ids, asked_for, processes.index)
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
