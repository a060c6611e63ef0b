"""The command line, one file a command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """See app.main. Ctrl-C ends quietly while that is imported, too."""
    try:
        from offload_sirius.cli.app import main as run
    except KeyboardInterrupt:
        return 130
    return run(arguments)
