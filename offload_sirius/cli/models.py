"""`offload-sirius models`: the names one can give to --model, and what is on this machine already."""

from __future__ import annotations

import json

import typer

from offload_sirius.cli import flags

EXAMPLES = """\b
Examples:
  offload-sirius models
  offload-sirius models --json
"""


def models(as_json: flags.Json = False) -> None:
    """List names for --model, and models that are here already."""
    from offload_sirius.engine.catalogue import catalogue

    found = catalogue()
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    width = max(map(len, found.aliases))
    for alias, hub_id in found.aliases.items():
        typer.echo(f"{alias:{width}}  {hub_id:40}  {found.where(alias, hub_id)}".rstrip())
    typer.echo("\nsynthetic shapes: " + ", ".join(f"synthetic:{shape}" for shape in found.synthetic_shapes))
    others = [model.hub_id for model in found.cached if model.hub_id not in found.aliases.values()]
    if others:
        typer.echo("also in the hub's cache: " + ", ".join(others))
    typer.echo("any other hub id, directory, .safetensors or .gguf file works as well")
