"""What a benchmark is asked for, and how it ends where that cannot be had: one line, and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from offload_sirius.errors import USER_ERRORS, ConfigError

WRONG_USE, INTERRUPTED = 2, 130


def require(options: argparse.Namespace, **least: int) -> None:
    """least: option -> the least that it may be. Raises ConfigError."""
    for name, fewest in least.items():
        if (found := getattr(options, name)) < fewest:
            raise ConfigError(f"--{name.replace('_', '-')} is {found}; give {fewest} or more")


def exit_status(measure: Callable[[], int], more_errors: tuple[type[Exception], ...] = ()) -> int:
    """What measuring returns; what a user, a file or Ctrl-C has caused is one line instead. more_errors: of that kind, too."""
    try:
        return measure()
    except (*USER_ERRORS, *more_errors) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USE
    except KeyboardInterrupt:
        print("interrupted: what is known stands in a partial file beside the result's", file=sys.stderr)
        return INTERRUPTED
