"""--trace FILE: a tracer for the time of a command, and its file at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from offload_sirius.files import require_writable
from offload_sirius.trace import Tracer


@contextmanager
def tracing(file: str | None) -> Iterator[Tracer | None]:
    """A tracer whose spans are written when the block has ended well; None where no file is asked for.

    Raises ConfigError at once where the file cannot be written.
    """
    if file is None:
        yield None
        return
    path, tracer = Path(file), Tracer()
    require_writable(path, "--trace")
    yield tracer
    tracer.write(path)
