"""What happened when: spans of time on the rows copy, compute, wait and sample, written as a trace that Perfetto opens.

Whoever does the work says when it began and ended; where times are taken on a device they are known later than the span, so a
moment may be a call that tells its time once it is asked. Knows no device, no weights and no model.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Protocol, get_args

from offload_sirius.files import write_whole

Row = Literal["copy", "compute", "wait", "sample"]
ROWS: tuple[Row, ...] = get_args(Row)

Moment = float | Callable[[], float]
"""Seconds of time.perf_counter, or a call that gives them; such a call may wait until they are known."""


class Clock(Protocol):
    """Gives the moments of work that is queued now."""

    def mark(self) -> Callable[[], float]:
        """The moment at which everything queued so far is done: seconds of time.perf_counter, told when it is asked. Cheap."""


class HostClock:
    """For work that is done when its call returns."""

    def mark(self) -> Callable[[], float]:
        """See Clock. Now."""
        now = time.perf_counter()
        return lambda: now


@dataclass(frozen=True, kw_only=True)
class Span:
    """Something that took time. Seconds of time.perf_counter."""

    row: Row
    name: str
    began: float
    ended: float
    arguments: Mapping[str, Any]


class Tracer:
    """Collects spans while an engine works. Thread-safe; grows by every span."""

    def __init__(self, clock: Clock | None = None) -> None:
        """clock: the host's where none is given; a device that works on its own replaces it by one that records events."""
        self.clock: Clock = clock or HostClock()
        self._lock = Lock()
        self._spans: list[tuple[Row, str, Moment, Moment, dict[str, Any]]] = []

    def span(self, row: Row, name: str, began: Moment, ended: Moment, **arguments: Any) -> None:
        """Something took from `began` to `ended`. arguments: what else a reader of the trace should see, as plain values."""
        with self._lock:
            self._spans.append((row, name, began, ended, arguments))

    def spans(self) -> list[Span]:
        """All spans so far, in order of their beginnings. Waits until the moments are known."""
        with self._lock:
            collected = list(self._spans)
        spans = [
            Span(row=row, name=name, began=_seconds(began), ended=_seconds(ended), arguments=arguments)
            for row, name, began, ended, arguments in collected
        ]
        return sorted(spans, key=lambda span: (span.began, span.ended))

    def busy_share(self, row: Row, began: float, ended: float) -> float:
        """Share of the time between two moments in which at least one span of the row was open."""
        busy_seconds, covered_until = 0.0, began
        for span in self.spans():
            if span.row == row and (end := min(span.ended, ended)) > covered_until:
                busy_seconds += max(end - max(span.began, covered_until), 0.0)
                covered_until = end
        return busy_seconds / (ended - began)

    def write(self, path: Path) -> None:
        """Write the trace as JSON for ui.perfetto.dev or chrome://tracing; the file is whole or not there. Raises ConfigError."""
        write_whole(path, json.dumps({"traceEvents": _events(self.spans()), "displayTimeUnit": "ms"}).encode())


def during(tracer: Tracer | None, row: Row, name: str) -> AbstractContextManager[None]:
    """A block of work as a span; nothing where there is no tracer."""
    return nullcontext() if tracer is None else _during(tracer, row, name)


@contextmanager
def _during(tracer: Tracer, row: Row, name: str) -> Iterator[None]:
    began = tracer.clock.mark()
    yield
    tracer.span(row, name, began, tracer.clock.mark())


def _seconds(moment: Moment) -> float:
    return moment() if callable(moment) else moment


def _events(spans: list[Span]) -> list[dict[str, Any]]:
    """Trace events as the Trace Event Format of Chrome defines them: complete events in microseconds, and the names of rows."""
    process_id = os.getpid()
    zero = spans[0].began if spans else 0.0
    events = [_metadata("process_name", process_id, 0, name="offload-sirius")]
    for thread_id, (name, lane) in enumerate(_lanes(spans), start=1):
        events.append(_metadata("thread_name", process_id, thread_id, name=name))
        events.append(_metadata("thread_sort_index", process_id, thread_id, sort_index=thread_id))
        events += [_complete(span, zero, process_id, thread_id) for span in lane]
    return events


def _lanes(spans: list[Span]) -> Iterator[tuple[str, list[Span]]]:
    """Rows as they are drawn: spans of one row that overlap are put on several lanes, as a viewer takes no overlaps in one."""
    for row in ROWS:
        lanes: list[list[Span]] = [[]]
        for span in (each for each in spans if each.row == row):
            free = next((lane for lane in lanes if not lane or lane[-1].ended <= span.began), None)
            if free is None:
                lanes.append(free := [])
            free.append(span)
        yield from ((row if index == 0 else f"{row} {index + 1}", lane) for index, lane in enumerate(lanes))


def _metadata(event: str, process_id: int, thread_id: int, /, **arguments: Any) -> dict[str, Any]:
    return {"name": event, "ph": "M", "ts": 0, "pid": process_id, "tid": thread_id, "args": arguments}


def _complete(span: Span, zero: float, process_id: int, thread_id: int) -> dict[str, Any]:
    # Whole nanoseconds, so that a span that begins where another ends does so in the file as well.
    began, ended = round((span.began - zero) * 1e9), round((span.ended - zero) * 1e9)
    return {
        "name": span.name,
        "cat": span.row,
        "ph": "X",
        "ts": began / 1e3,
        "dur": (ended - began) / 1e3,
        "pid": process_id,
        "tid": thread_id,
        "args": dict(span.arguments),
    }
