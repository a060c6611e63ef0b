"""`offload-sirius bench decode`: the same prompts decoded in several ways, in one table beside the full model."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from offload_sirius.bench.prompts import BUILT_IN, read_prompts
from offload_sirius.bench.variants import DecodeBench, variants_of
from offload_sirius.cli import flags, settings
from offload_sirius.cli.flag_group import Values, with_flag_groups
from offload_sirius.cli.generate import explain
from offload_sirius.cli.tracing import tracing
from offload_sirius.config import MODES, DecodingConfig, EngineConfig, GenerationConfig, help_of
from offload_sirius.errors import ConfigError

if TYPE_CHECKING:
    from offload_sirius.bench.answers import Answer, DecodeRow
    from offload_sirius.bench.decode import DecodeReport
    from offload_sirius.engine import Engine

EXAMPLES = """\b
Examples:
  offload-sirius bench decode --link-gbps 0.5 --window 8
  offload-sirius bench decode --sparsity griffin,cats --accept exact,threshold --tree-width 1,4 --prompts my.jsonl --json
"""

NUM_TOKENS = 64
"""Of an answer, where nobody says how many."""

SAID_EVERY_SECONDS = 5.0

STREAMED = settings.ENGINE.only(
    *("device", "device_memory", "host_memory", "link_gbps", "dtype", "quantize", "quantize_group", "quantize_head"),
    *("kv_dtype", "keep_blocks", "threads", "cuda_graphs", "shared_host_buffers"),
)
"""What all ways of decoding have in common. How many positions and answers there is room for is the measurement's to decide."""

EXAMPLE_OF = {"--keep": "0.5,0.75", "--tree-width": "1,4"}

Value = TypeVar("Value")


def _list(name: str, metavar: str) -> Any:
    text = help_of(DecodingConfig, name) + " Several with commas."
    return typer.Option("--" + name.replace("_", "-"), help=text, metavar=metavar, rich_help_panel=flags.DECODING)


@with_flag_groups
def decode(
    *,
    model: settings.Model = EngineConfig.model,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            help="JSONL file with a `prompt` in each line. Default: three short ones.",
            metavar="FILE",
            rich_help_panel=flags.PROMPT,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Take the first N prompts only.", metavar="N", rich_help_panel=flags.PROMPT)
    ] = None,
    chat: settings.Chat = GenerationConfig.chat,
    modes: Annotated[
        str,
        typer.Option(
            "--modes",
            help="Of " + ", ".join(MODES) + ", with commas; full is always measured.",
            metavar="MODES",
            rich_help_panel=flags.DECODING,
        ),
    ] = ",".join(MODES),
    decoding: Annotated[Values, settings.DECODING.without("mode")],
    sparsity: Annotated[str, _list("sparsity", "KINDS")] = DecodingConfig.sparsity,
    keep: Annotated[str, _list("keep", "SHARES")] = str(DecodingConfig.keep),
    window: Annotated[str, _list("window", "N,auto")] = str(DecodingConfig.window),
    accept: Annotated[str, _list("accept", "RULES")] = DecodingConfig.accept,
    draft: Annotated[str, _list("draft", "PLACES")] = DecodingConfig.draft,
    draft_quantize: Annotated[str, settings.DECODING.option("draft_quantize")] = DecodingConfig.draft_quantize,
    prior: Annotated[bool, settings.DECODING.option("prior")] = False,  # no row depends on those before it, nor on earlier runs
    draft_keep: Annotated[float | None, settings.DECODING.option("draft_keep")] = DecodingConfig.draft_keep,
    tree_width: Annotated[str, _list("tree_width", "N")] = str(DecodingConfig.tree_width),
    force_aal: Annotated[
        float | None,
        typer.Option(
            "--force-aal",
            help="Let windows give so many tokens on average, whatever the models say; all passes are run and timed.",
            metavar="X",
            rich_help_panel=flags.DECODING,
        ),
    ] = None,
    max_new_tokens: Annotated[int, settings.GENERATION.option("max_new_tokens")] = NUM_TOKENS,
    generation: Annotated[GenerationConfig, settings.GENERATION.without("stop")],
    engine: Annotated[Values, STREAMED],
    device_memory: flags.StreamingDeviceMemory = None,
    plot: flags.Plot = None,
    trace: flags.Trace = None,
    as_json: flags.Report = False,
    verbose: flags.Verbose = False,
) -> None:
    """Measure decoding in several ways beside the full model's."""
    # Only with cats may there be a threshold of cats; variants have sparsities of their own.
    shared = DecodingConfig(sparsity="griffin" if decoding["cats_threshold"] is None else "cats", prior=prior, **decoding)
    variants = variants_of(
        shared,
        draft_keep=draft_keep,
        draft_quantize=draft_quantize,  # type: ignore[arg-type]  # checked by DecodingConfig
        modes=_values("--modes", modes, _mode),  # type: ignore[arg-type]  # checked by DecodingConfig, as are the next
        sparsities=_values("--sparsity", sparsity, str),  # type: ignore[arg-type]
        keeps=_values("--keep", keep, float),
        windows=_values("--window", window, str),
        accepts=_values("--accept", accept, str),  # type: ignore[arg-type]
        drafts=_values("--draft", draft, str),  # type: ignore[arg-type]
        tree_widths=_values("--tree-width", tree_width, int),
    )
    # Every answer begins where the first one does.
    generation = replace(generation, max_new_tokens=max_new_tokens, chat=chat, reuse=False)
    config = EngineConfig(model=model, device_memory=device_memory or EngineConfig.device_memory, **engine)
    texts = BUILT_IN if prompts is None else read_prompts(Path(prompts))
    bench = DecodeBench(
        prompts=texts if limit is None else texts[: flags.at_least_one("--limit", limit)],
        variants=variants,
        generation=generation,
        forced_aal=None if force_aal is None else _fraction(force_aal),
    )
    report = _measure(config, bench, trace, plot, all_streamed=device_memory is None, verbose=verbose)
    typer.echo(json.dumps(report.as_json()) if as_json else "\n".join(table(report)))


def _measure(
    config: EngineConfig, bench: DecodeBench, trace: str | None, plot: str | None, *, all_streamed: bool, verbose: bool
) -> DecodeReport:
    from offload_sirius.bench.decode import decode_config, measure_decode
    from offload_sirius.bench.plot import plot_decode, require_plot
    from offload_sirius.cli.console import LoadProgress
    from offload_sirius.engine import open_model

    if plot is not None:
        require_plot(Path(plot))
    with tracing(trace) as tracer:
        config = decode_config(open_model(config.model), config, bench, all_streamed=all_streamed)
        watch = SayingWatch(bench.prompts[0] if verbose else None)
        report = measure_decode(config, bench, progress=LoadProgress(), watch=watch, tracer=tracer)
    if plot is not None:
        plot_decode(report, Path(plot))
    return report


class SayingWatch:
    """Says now and then on stderr how far it is."""

    def __init__(self, explained: str | None) -> None:
        """explained: a prompt for which each plan is explained; None for no explanation."""
        self._explained = explained
        self._began = self._said = time.perf_counter()

    def loaded(self, engine: Engine) -> None:
        """See Watch."""
        if self._explained is not None:
            explain(engine, len(engine.model.encode(self._explained)))

    def answered(self, name: str, num_answers: int, num_all: int) -> None:
        """See Watch."""
        from offload_sirius.cli.console import say

        now = time.perf_counter()
        if now - self._said > SAID_EVERY_SECONDS:
            self._said = now
            left = (now - self._began) / num_answers * (num_all - num_answers)
            say(f"{name}: {num_answers} of {num_all} answers, about {left:.0f} s left")

    def measured(self, variant: DecodingConfig, answers: Sequence[Answer]) -> None:
        """See Watch."""


def _values(flag: str, text: str, kind: Callable[[str], Value]) -> list[Value]:
    try:
        return [kind(each.strip()) for each in text.split(",")]
    except ValueError as error:
        numbers = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"{flag} is {text}; it must be {numbers} with commas, such as {EXAMPLE_OF[flag]}") from error


def _mode(text: str) -> str:
    if text not in MODES:
        raise ConfigError(f"--modes has {text}; it must be of " + ", ".join(MODES))
    return text


def _fraction(aal: float) -> Fraction:
    """The number as it was typed: 15.2, and not the nearest sum of powers of two."""
    if not math.isfinite(aal):
        raise ConfigError(f"--force-aal is {aal}; it must be a number")
    return Fraction(str(aal))


@dataclass(frozen=True, kw_only=True)
class Column:
    """One of the table's."""

    head: str
    width: int
    value: Callable[[DecodeRow], float | str | None]
    form: str

    def cell(self, row: DecodeRow) -> str:
        """The row's value, as wide as the column; what there is not is a dash."""
        value = self.value(row)
        return f"{'-' if value is None else format(value, self.form):>{self.width}}"


COLUMNS = (
    Column(head="ratio", width=6, value=lambda row: row.ratio, form=".3f"),
    Column(head="AAL", width=6, value=lambda row: row.aal, form=".2f"),
    Column(head="accept", width=7, value=lambda row: row.acceptance, form=".1%"),
    Column(head="density", width=8, value=lambda row: row.effective_density, form=".3f"),
    Column(head="MB/token", width=9, value=lambda row: _scaled(row.nbytes_per_token, 1e6), form=".1f"),
    Column(head="agree", width=7, value=lambda row: row.agreement, form=".1%"),
    Column(head="same", width=5, value=lambda row: row.num_identical, form="d"),
    Column(head="busy", width=7, value=lambda row: row.busy_share, form=".1%"),
    Column(head="hits", width=7, value=lambda row: row.cache_hit_share, form=".1%"),
    Column(head="draft s", width=8, value=lambda row: row.draft_seconds, form=".4f"),
    Column(head="/link", width=6, value=lambda row: row.draft_link_ratio, form=".3f"),
    Column(head="correct s", width=10, value=lambda row: row.correction_seconds, form=".4f"),
    Column(head="/full", width=6, value=lambda row: row.correction_ratio, form=".3f"),
)


def table(report: DecodeReport) -> list[str]:
    """A title, a head, and a line for each row."""
    full = report.rows[0]
    where = f"{full.num_streamed_layers} of {full.num_streamed_layers + full.num_resident_layers} layers streamed in mode full"
    link = "" if report.link_gbps is None else f" at {report.link_gbps:g} GB/s"
    width = max(len(row.name) for row in report.rows)
    answers = f"{report.num_prompts} prompts, up to {report.max_new_tokens} tokens"
    return [
        f"{report.model} on {report.device}, {report.dtype}: {answers}, {where}{link}",
        f"{'':{width}}  {'s/token (lowest to highest)':>27}" + "".join(f"{each.head:>{each.width}}" for each in COLUMNS),
        *(f"{row.name:{width}}  {_seconds(row):>27}" + "".join(each.cell(row) for each in COLUMNS) for row in report.rows),
    ]


def _seconds(row: DecodeRow) -> str:
    spread = row.seconds_per_token
    return "-" if spread is None else f"{spread.median:.4f} ({spread.lowest:.4f} to {spread.highest:.4f})"


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
