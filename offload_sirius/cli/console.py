"""What people see while they wait: progress, the text as it comes, one line of figures. Text on stdout, all else on stderr."""

from __future__ import annotations

import os
import sys
import time
from threading import Lock
from typing import Any

from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece
from offload_sirius.weights.predict import Bound, Prediction

PLAIN_PROGRESS_SECONDS = 5.0
"""Where stderr is no terminal, a line this often."""

BOUNDS: dict[Bound, str] = {"link": "the link", "disk": "the disk", "compute": "computing"}
"""What a pass may be held up by, for people."""

CLEAR_GAIN = 0.05
"""Smaller differences between two ways to decode are not worth a line."""

PURPOSES = {"sparsity": "choice of neurons", "neuron_cache": "neuron caches", "kept_neurons": "kept neurons for drafts"}
"""What memory is for, where its name on the bill says too little."""

SLOW_TOKEN_SECONDS = 0.5
"""A model that takes longer a token shows its rate while it writes."""


def purpose(name: str) -> str:
    """A name on a plan's bill, for people."""
    return PURPOSES.get(name, name.replace("_", " "))


def say(line: str) -> None:
    """A line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


class LoadProgress:
    """Bytes, rate and time left of one piece of work at a time: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._lock = Lock()
        self._what = ""
        self._total_nbytes = 0
        self._nbytes = 0
        self._began = 0.0
        self._said = 0.0

    def begin(self, what: str, total_nbytes: int) -> None:
        """See engine.Progress."""
        self._what, self._total_nbytes, self._nbytes = what, total_nbytes, 0
        self._began = self._said = time.perf_counter()
        if sys.stderr.isatty():
            self._bar = _bar(what, total_nbytes)

    def advance(self, nbytes: int) -> None:
        """See engine.Progress."""
        with self._lock:
            self._nbytes += nbytes
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], advance=nbytes)
            elif time.perf_counter() - self._said > PLAIN_PROGRESS_SECONDS:
                self._said = time.perf_counter()
                self._say_so_far()

    def end(self) -> None:
        """See engine.Progress."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def warn(self, line: str) -> None:
        """See engine.Progress."""
        say("warning: " + line)

    def _say_so_far(self) -> None:
        seconds = time.perf_counter() - self._began
        rate = self._nbytes / seconds
        left = (self._total_nbytes - self._nbytes) / rate
        say(
            f"{self._what}: {self._nbytes / 1e9:.1f} of {self._total_nbytes / 1e9:.1f} GB, "
            f"{rate / 1e9:.2f} GB/s, {left:.0f} s left"
        )


def _bar(what: str, total_nbytes: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.add_task(what, total=total_nbytes)
    bar.start()
    return bar


class TextWriter:
    """Writes pieces to stdout as they come; on a terminal, a slow model's rate stands behind the text until more comes."""

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        self._column = 0
        self._begun = False

    def write(self, piece: TextPiece) -> None:
        """Write what a token added."""
        self._begun = True
        self._erase_rate()
        sys.stdout.write(piece.text)
        self._column = _column_behind(self._column, piece.text)
        if piece.seconds > SLOW_TOKEN_SECONDS * piece.new_tokens:
            self._show_rate(piece)
        sys.stdout.flush()

    def end(self) -> None:
        """The text is over: end its line, where it has begun."""
        if not self._begun:
            return
        self._erase_rate()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _show_rate(self, piece: TextPiece) -> None:
        rate = f"  [{piece.new_tokens / piece.seconds:.2f} tokens/s]"
        width = os.get_terminal_size(sys.stdout.fileno()).columns if self._on_terminal else 0
        # It must not wrap: only what is behind the cursor on its own line can be taken back.
        if self._column % max(width, 1) + len(rate) < width:
            sys.stdout.write(f"\x1b[2m{rate}\x1b[0m\x1b[{len(rate)}D")

    def _erase_rate(self) -> None:
        if self._on_terminal:
            sys.stdout.write("\x1b[K")


def _column_behind(column: int, text: str) -> int:
    last_line = text.rpartition("\n")[2]
    return len(last_line) if "\n" in text else column + len(last_line)


def summary(result: Generation) -> str:
    """One line of figures."""
    parts = [f"{result.new_tokens} tokens", f"first after {result.ttft_seconds:.2f} s"]
    if result.tokens_per_second is not None:
        parts.append(f"{result.tokens_per_second:.2f} tokens/s")
    if result.aal is not None:
        parts.append(f"{result.aal:.2f} tokens a correction (AAL)")
    if result.acceptance is not None:
        parts.append(f"{result.acceptance:.0%} of drafts accepted")
    if result.tokens_by_origin.lookup:
        parts.append(f"{result.tokens_by_origin.lookup} tokens looked up")
    link = result.link
    if link.gbytes_per_second is not None and link.busy_share is not None:
        per_token = link.copied_bytes / max(result.new_tokens, 1) / 1e9
        parts.append(f"{per_token:.3f} GB a token over the link at {link.gbytes_per_second:.2f} GB/s, {link.busy_share:.0%} busy")
    return ", ".join(parts)


def status(result: Generation, context: int) -> str:
    """The line below an answer of a chat. context: positions that there are."""
    parts = []
    if result.tokens_per_second is not None:
        parts.append(f"{result.tokens_per_second:.2f} tokens/s")
    if result.aal is not None:
        parts.append(f"AAL {result.aal:.2f}")
    if result.link.busy_share is not None:
        parts.append(f"link {result.link.busy_share:.0%} busy")
    # The last token of an answer takes no position yet.
    parts.append(f"{min(result.prompt_tokens + result.new_tokens, context)} of {context} positions")
    return ", ".join(parts)


def advice(result: Generation) -> str | None:
    """A line that says so where drafting cost more than it saved; None where it paid, or nothing is known of it.

    A pass over one token takes no longer than a correction, which takes the same weights over more of them.
    """
    rate, correction = result.tokens_per_second, result.correction_seconds
    if rate is None or correction is None or rate * correction > 1 - CLEAR_GAIN:
        return None
    return f"drafts cost more than they saved: --mode full would give {1 / correction:.2f} tokens/s or more here"


def predicted(prediction: Prediction) -> str:
    """One line of what was to be expected, and of what that rests on."""
    rests_on = ", ".join(sorted(set(prediction.sources.values())))
    return (
        f"predicted: {prediction.seconds_per_token:.3g} s a token{_passes(prediction)}, first after "
        f"{prediction.first_token_seconds:.3g} s, bound by {BOUNDS[prediction.bound]} (rates: {rests_on})"
    )


def _passes(prediction: Prediction) -> str:
    """What drafts and corrections take, where there are any."""
    if prediction.draft is None:
        return ""
    passes = f"a draft step {prediction.draft.seconds:.3g} s"
    if not prediction.windows:
        return f" ({passes})"
    assumed = prediction.windows[0]
    return (
        f" ({passes}, a correction of {assumed.window} tokens {assumed.correction.seconds:.3g} s, "
        f"were {assumed.acceptance:.0%} of the drafted tokens accepted)"
    )
