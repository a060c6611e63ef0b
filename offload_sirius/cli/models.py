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
    """List aliases, synthetic shapes, and models that need no download."""
    from offload_sirius.engine.catalogue import catalogue

    found = catalogue()
    if as_json:
        typer.echo(json.dumps(found.as_json()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Aliases for --model", title_justify="left")
    for heading in ("alias", "hub id", "on this machine"):
        table.add_column(heading)
    for alias, repo_id in found.aliases.items():
        table.add_row(alias, repo_id, found.where(alias, repo_id))
    console = Console()
    console.print(table)
    console.print("Synthetic shapes: " + ", ".join(f"synthetic:{shape}" for shape in found.synthetic_shapes))
    others = [model for model in found.cached if model.hub_id not in found.aliases.values()]
    if others:
        console.print("Also in the hub's cache: " + ", ".join(model.hub_id for model in others))
    console.print("Any other hub id, directory, .safetensors or .gguf file works as well.")
