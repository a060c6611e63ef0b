"""A process in which chat templates are rendered, and nothing else: what one of them takes of time and memory ends here.

Templates are Jinja programs from strangers. They run in Jinja's sandbox, with the names that Hugging Face promises them
(https://huggingface.co/docs/transformers/chat_templating). The sandbox keeps them from what they are not given; that they end,
and do not fill the memory, only a process of their own can promise, as a single operation of Python's may take for ever.

Reads requests from standard input and writes replies to standard output, JSON, a line each. Knows nothing of models.
"""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.parser import Parser

MOST_ADDED, MOST_TIMES = 1 << 18, 8
"""Characters that a template may add to a conversation, and how many times longer than the request it may make it: the longest of
those published add some ten thousand, and text that is escaped twice becomes a few times longer."""


class GenerationBlocks(Extension):
    """`{% generation %}` marks answers for training; here it only lets its content through."""

    tags = {"generation"}  # noqa: RUF012  so declared by Jinja

    def parse(self, parser: Parser) -> list[Node]:
        """See Extension."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def serve(seconds: float, nbytes: int, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until there are no more. seconds: CPU time for each, beyond which the system ends this process.

    nbytes: memory beyond what the process has now.
    """
    size_nbytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_nbytes + nbytes, size_nbytes + nbytes))
    for reply in _replies(seconds, requests):
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _replies(seconds: float, requests: IO[str]) -> Iterator[dict[str, str]]:
    source, template = None, None
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            if template is None or request["source"] != source:
                source, template = request["source"], compiled(request["source"])
            reply = rendered(template, request["variables"], MOST_ADDED + MOST_TIMES * len(line))
        except Exception as error:  # syntax, or what a constant expression raises while it is folded
            reply = {"invalid": _line(error)}
        signal.setitimer(signal.ITIMER_PROF, 0)
        yield reply


def rendered(template: Template, variables: dict[str, Any], most: int) -> dict[str, str]:
    """`text`, or `refused` with what the template raised. It is written piece by piece, up to where it is too long."""
    pieces: list[str] = []
    left = most
    try:
        for piece in template.generate(**variables):
            left -= len(piece)
            if left < 0:
                return {"refused": f"it gives more than {most} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except Exception as error:  # foreign code: any exception is possible, and none is a bug of this program
        return {"refused": _line(error)}


def compiled(source: str) -> Template:
    """Raises whatever Jinja raises."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _line(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    return " ".join(str(error).split())[:500] or type(error).__name__


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which a model has never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
