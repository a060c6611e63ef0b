"""`offload-sirius pack`: a copy of a model that loads at the disk's speed."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_sirius.cli import flags, settings
from offload_sirius.cli.flag_group import Values, with_flag_groups
from offload_sirius.config import EngineConfig
from offload_sirius.errors import ConfigError
from offload_sirius.units import format_size

if TYPE_CHECKING:
    from offload_sirius.engine.packing import PackReport

EXAMPLES = """\b
Examples:
  offload-sirius pack --model llama-3-70b --out llama-3-70b-int4 --quantize int4 --report
  offload-sirius pack --model ./llama-3-70b-int4 --verify
"""


@with_flag_groups
def pack(
    *,
    model: settings.Model = EngineConfig.model,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Folder to write, which must be new. One that was not finished is completed.",
            metavar="DIR",
            rich_help_panel=flags.MODEL,
        ),
    ] = None,
    quantize: Annotated[
        str,
        typer.Option(
            "--quantize",
            help="Store the layers' matrices in 8 or 4 bits, without calibration: int8, int4 or none.",
            metavar="KIND",
            rich_help_panel=flags.MODEL,
        ),
    ] = EngineConfig.quantize,
    form: Annotated[Values, settings.ENGINE.only("quantize_group", "keep_blocks", "quantize_head", "dtype")],
    report: Annotated[
        bool,
        typer.Option("--report", help="Say how far each layer is from what it was quantised from.", rich_help_panel=flags.OUTPUT),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read the whole copy and compare every checksum: of --out, or of a --model that is packed.",
            rich_help_panel=flags.OUTPUT,
        ),
    ] = False,
    as_json: flags.Report = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the traceback of an error.", rich_help_panel=flags.OUTPUT)
    ] = False,
) -> None:
    """Write a copy of a model whose layers lie as they are held in memory, so that it loads at the disk's speed.

    Quantised layers, too, can then stay on disk. The copy gives bit for bit what the model gives with the same --quantize. It is
    a model when all of it is written: what was interrupted goes on where it was when the same command is given again.
    """
    config = EngineConfig(model=model, quantize=quantize, **form)  # type: ignore[arg-type]  # checked by EngineConfig
    if out is None:
        _require_something_else(config, asked=report or verify)
    found, verified_nbytes = _packed(config, out, verify=verify)
    if as_json:
        typer.echo(json.dumps(_figures(found, verified_nbytes)))
        return
    typer.echo(_line(found))
    if verified_nbytes is not None:
        typer.echo(f"every checksum is right, of {format_size(verified_nbytes)}")
    if report:
        _print_errors(found)


def _require_something_else(config: EngineConfig, *, asked: bool) -> None:
    """Nothing is written. Raises ConfigError where nothing else is asked for, or what only writing takes."""
    if not asked:
        raise ConfigError("--out is missing; give the folder to write, or --verify or --report with a --model that is packed")
    for flag, found, usual in (
        ("quantize", config.quantize, EngineConfig.quantize),
        ("quantize-head", config.quantize_head, EngineConfig.quantize_head),
        ("dtype", config.dtype, EngineConfig.dtype),
    ):
        if found != usual:
            raise ConfigError(f"--{flag} is {found}; it must be left out without --out, as nothing is written")


def _packed(config: EngineConfig, out: str | None, *, verify: bool) -> tuple[PackReport, int | None]:
    """What there is when all is done, and the bytes that were verified."""
    # Everything was checked that can be without it: only now the second that torch takes.
    from pathlib import Path

    from offload_sirius.cli.console import LoadProgress
    from offload_sirius.engine.packing import pack, report_of, verify_copy

    progress, copy = LoadProgress(), config.model
    if out is not None:
        directory = Path(out).expanduser()
        pack(config, directory, progress)
        copy = str(directory)
    verified_nbytes = verify_copy(copy, progress) if verify else None
    return report_of(copy), verified_nbytes


def _line(found: PackReport) -> str:
    group = "" if found.quantize_group is None else f", {found.quantize} in groups of {found.quantize_group}"
    head = "" if found.quantize_head == "none" else f", the head in {found.quantize_head}"
    layers = f"{found.source}, {found.num_layers} layers, {found.dtype}{group}{head}"
    return f"{found.directory}: {layers}, {format_size(found.nbytes)}"


def _figures(found: PackReport, verified_nbytes: int | None) -> dict[str, Any]:
    return {
        "model": found.source,
        "out": str(found.directory),
        "dtype": found.dtype,
        "quantize": found.quantize,
        "quantize_group": found.quantize_group,
        "quantize_head": found.quantize_head,
        "layers": found.num_layers,
        "bytes": found.nbytes,
        "errors": [{role: asdict(error) for role, error in layer.items()} for layer in found.errors],
        "verified_bytes": verified_nbytes,
    }


def _print_errors(found: PackReport) -> None:
    """A line a layer: the root mean square of the errors over that of the weights, by matrix, and the largest error of all."""
    if not found.errors:
        typer.echo("its matrices are not quantised")
        return
    roles = list(found.errors[0])
    typer.echo("layer  " + "".join(f"{role:>8}" for role in roles) + "   largest")
    for layer, errors in enumerate(found.errors):
        shares = "".join(f"{errors[role].relative_rms:8.2%}" if role in errors else " " * 8 for role in roles)
        typer.echo(f"{layer:5}  {shares}{max((error.largest for error in errors.values()), default=0.0):10.3g}")
