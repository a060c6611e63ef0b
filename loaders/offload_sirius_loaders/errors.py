"""The one error this package raises. Knows nothing else, so that it costs nothing to import."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint that cannot be used: the message names the file, what was found, what was needed and the remedy.

    The message is one line and complete: a command line prints it as it is.
    """
