"""Flags that several commands share and that are no settings; names of the panels; one setting in another form."""

from __future__ import annotations

from typing import Annotated

import typer

from offload_sirius.config import EngineConfig, help_of
from offload_sirius.errors import ConfigError

MODEL, PLACE, DECODING, SAMPLING, PROMPT, OUTPUT = "Model", "Memory and device", "Decoding", "Sampling", "Prompt", "Output"
DESCRIBED = "A machine you do not have"

StreamingDeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        help=help_of(EngineConfig, "device_memory") + " Default: what slots take, so that every layer is streamed.",
        metavar="SIZE",
        rich_help_panel=PLACE,
    ),
]
Trace = Annotated[
    str | None,
    typer.Option(
        "--trace",
        help="Write what was copied, computed, waited for and sampled when, for ui.perfetto.dev.",
        metavar="FILE",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with text and figures instead of the text.", rich_help_panel=OUTPUT)
]
Report = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.", rich_help_panel=OUTPUT)]
Plot = Annotated[
    str | None, typer.Option("--plot", help="Draw the figures as a PNG picture.", metavar="FILE", rich_help_panel=OUTPUT)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Print the plan, and the traceback of an error.", rich_help_panel=OUTPUT)
]


def at_least_one(flag: str, number: int) -> int:
    """The number. Raises ConfigError where it is less than 1."""
    if number < 1:
        raise ConfigError(f"{flag} is {number}; it must be at least 1")
    return number
