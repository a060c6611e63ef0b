"""`offload-sirius bench`: link measures what this machine can carry, stream what a model makes of it; decode has its own file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_sirius.bench.spread import NUM_REPEATS
from offload_sirius.cache import made_cache_folder
from offload_sirius.cli import bench_decode, flags, settings
from offload_sirius.cli.flag_group import with_flag_groups
from offload_sirius.cli.generate import explain
from offload_sirius.cli.tracing import tracing
from offload_sirius.config import EngineConfig
from offload_sirius.errors import ConfigError
from offload_sirius.units import format_size, parse_size

if TYPE_CHECKING:
    from offload_sirius.bench.link import LinkReport
    from offload_sirius.bench.spread import Spread
    from offload_sirius.bench.stream import StreamReport

EXAMPLES = """\b
Examples:
  offload-sirius bench link --json
  offload-sirius bench stream --model synthetic:tinyllama-1.1b --link-gbps 1
  offload-sirius bench decode --link-gbps 1 --window 8
"""
LINK_EXAMPLES = """\b
Examples:
  offload-sirius bench link
  offload-sirius bench link --sizes 1MiB,64MiB --path /data/models --plot link.png
"""
STREAM_EXAMPLES = """\b
Examples:
  offload-sirius bench stream --model synthetic:tinyllama-1.1b --link-gbps 1
  offload-sirius bench stream --model llama-3-8b --device-memory 8GiB --trace trace.json --json
"""

STREAMED = settings.ENGINE.only(
    *("model", "device", "device_memory", "host_memory", "link_gbps"),
    *("dtype", "quantize", "quantize_group", "quantize_head", "keep_blocks", "threads", "shared_host_buffers"),
)
"""What full passes depend on."""

app = typer.Typer(
    help="Measure links, streaming over them, and decoding with what is streamed.", epilog=EXAMPLES, rich_markup_mode=None
)
app.command("decode", epilog=bench_decode.EXAMPLES)(bench_decode.decode)


@app.command(epilog=LINK_EXAMPLES)
def link(
    device: settings.Device = EngineConfig.device,
    sizes: Annotated[
        str | None,
        typer.Option(
            "--sizes",
            help="Bytes of a copy, with commas; what does not fit is left out. Default: 64KiB, 256KiB, ... 1GiB.",
            metavar="SIZES",
        ),
    ] = None,
    path: Annotated[
        str | None,
        typer.Option("--path", help="File or folder whose disk is measured; default the cache folder's.", metavar="PATH"),
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Measurements of each figure.", metavar="N")] = NUM_REPEATS,
    plot: flags.Plot = None,
    as_json: flags.Report = False,
) -> None:
    """Measure copies, the disk, and gathered records."""
    flags.at_least_one("--repeats", repeats)
    EngineConfig(device=device)  # says what is wrong before torch is imported
    wanted = None if sizes is None else [_copy_size(text) for text in sizes.split(",")]

    from offload_sirius.bench.link import SIZES, fitting_sizes, measure_link
    from offload_sirius.bench.plot import plot_link, require_plot
    from offload_sirius.cli.console import LoadProgress, say
    from offload_sirius.engine.placement import find_device

    plot_path = None if plot is None else Path(plot)
    if plot_path is not None:
        require_plot(plot_path)
    found = find_device(device)
    fitting = fitting_sizes(wanted or SIZES, found)
    if left_out := sorted(set(wanted or SIZES) - set(fitting)):
        say(f"no room to measure copies of {', '.join(map(format_size, left_out))}")
    report = measure_link(found, fitting, Path(path) if path else made_cache_folder(), LoadProgress(), repeats)
    if plot_path is not None:
        plot_link(report, plot_path)
    _print(report.as_json() if as_json else _link_table(report))


@app.command(epilog=STREAM_EXAMPLES)
@with_flag_groups
def stream(
    *,
    config: Annotated[EngineConfig, STREAMED],
    device_memory: flags.StreamingDeviceMemory = None,
    passes: Annotated[int, typer.Option("--passes", help="Passes that count, after two that do not.", metavar="N")] = NUM_REPEATS,
    plot: flags.Plot = None,
    trace: flags.Trace = None,
    as_json: flags.Report = False,
    verbose: flags.Verbose = False,
) -> None:
    """Measure full passes of a model over its link."""
    if device_memory:
        config = replace(config, device_memory=device_memory)
    report = _stream(
        config, flags.at_least_one("--passes", passes), trace, plot, all_streamed=device_memory is None, verbose=verbose
    )
    _print(report.as_json() if as_json else _stream_table(report))


def _stream(
    config: EngineConfig, num_passes: int, trace: str | None, plot: str | None, *, all_streamed: bool, verbose: bool
) -> StreamReport:
    from offload_sirius.bench.plot import plot_stream, require_plot
    from offload_sirius.bench.stream import PROMPT, measure_stream, streaming_config
    from offload_sirius.cli.console import LoadProgress
    from offload_sirius.engine import build, open_model
    from offload_sirius.trace import Tracer

    if plot is not None:
        require_plot(Path(plot))
    with tracing(trace) as asked_for:
        opened = open_model(config.model)
        config = streaming_config(opened, config, num_passes=num_passes, all_streamed=all_streamed)
        tracer = asked_for or Tracer()
        progress = LoadProgress()
        with build(opened, config, progress, tracer) as engine:
            if verbose:
                explain(engine, len(PROMPT))
            report = measure_stream(engine, tracer, num_passes, progress)
    if plot is not None:
        plot_stream(report, Path(plot))
    return report


def _copy_size(text: str) -> int:
    nbytes = parse_size(text).nbytes
    if nbytes is None:
        raise ConfigError(f"--sizes: {text!r} is a share; give sizes such as 1MiB,64MiB")
    return nbytes


def _print(what: dict[str, Any] | list[str]) -> None:
    typer.echo(json.dumps(what) if isinstance(what, dict) else "\n".join(what))


def _link_table(report: LinkReport) -> list[str]:
    lines = [f"copies, {report.device}"]
    lines += [f"  {rate.way:28} {format_size(rate.nbytes):>11} {_rate(rate.bytes_per_second)}" for rate in report.copies]
    lines.append(f"disk, {report.disk.path}, by {'O_DIRECT' if report.disk.direct else 'the page cache'}")
    for depth in report.disk.rates:
        what = f"{depth.depth} x {format_size(depth.read_nbytes)} at a time"
        lines.append(f"  {what:40} {_rate(depth.bytes_per_second)}")
    lines.append("neuron records gathered out of host memory, kept bytes a second")
    lines += [f"  {rate.way:28} runs of {rate.run_length:4} {_rate(rate.bytes_per_second)}" for rate in report.gathers]
    return lines


def _rate(rate: Spread) -> str:
    return f"{rate.median / 1e9:8.2f} GB/s  ({rate.lowest / 1e9:.2f} to {rate.highest / 1e9:.2f})"


def _stream_table(report: StreamReport) -> list[str]:
    seconds, bound = report.seconds, report.bound
    rate = f"{bound.bytes_per_second / 1e9:.2f} GB/s, {bound.what}"
    return [
        f"{report.model} on {report.device}, {report.num_slots} slots: {report.pass_nbytes / 1e9:.3f} GB a pass over the link",
        f"  pass     {seconds.median:.3f} s  ({seconds.lowest:.3f} to {seconds.highest:.3f}), "
        f"{report.pass_nbytes / seconds.median / 1e9:.2f} GB/s",
        f"  ceiling  {bound.seconds:.3f} s at {rate}: {report.link_share:.1%} used",
        f"  link     {report.copy_busy_share:.1%} of the time busy",
        f"  waited   {report.gap_seconds:.3f} s a pass, longest for layers "
        + ", ".join(f"{each.layer} ({each.seconds:.3f} s)" for each in _longest(report)),
    ]


def _longest(report: StreamReport) -> list[Any]:
    return sorted(report.layers, key=lambda layer: layer.seconds, reverse=True)[:3]
