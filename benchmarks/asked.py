"""What a benchmark is asked for must be something: numbers of the command line that are too small to measure with."""

from __future__ import annotations

import argparse

from offload_sirius.errors import ConfigError


def require(options: argparse.Namespace, **least: int) -> None:
    """least: option -> the least that it may be. Raises ConfigError."""
    for name, fewest in least.items():
        if (found := getattr(options, name)) < fewest:
            raise ConfigError(f"--{name.replace('_', '-')} is {found}; give {fewest} or more")
