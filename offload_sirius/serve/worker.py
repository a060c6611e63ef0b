"""The one thread that owns engine and batch: takes requests from the queue as slots become free, and steps. Knows no HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Literal, Protocol

from offload_sirius.config import GenerationConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.stream import TextPiece
from offload_sirius.engine import Engine, Prompt
from offload_sirius.errors import USER_ERRORS
from offload_sirius.serve.errors import ApiError, ServerStoppingError, SlowReaderError
from offload_sirius.serve.fair_queue import FairQueue
from offload_sirius.serve.figures import Figures, LinkCounters
from offload_sirius.serve.mailbox import Event

_LOG = logging.getLogger(__name__)

MAX_RETRY_SECONDS = 60


class Answer(Protocol):
    """What is written for one request."""

    @property
    def state(self) -> Literal["waiting", "active", "done"]: ...

    @property
    def result(self) -> Generation: ...

    @property
    def error(self) -> Exception | None: ...

    @property
    def stats(self) -> DecodeStats: ...

    def cancel(self) -> None: ...


class Batcher(Protocol):
    """Answers that are written together."""

    @property
    def max_answers(self) -> int: ...

    def submit(self, prompt: Prompt, config: GenerationConfig, *, on_piece: Callable[[TextPiece], None]) -> Answer: ...

    def step(self) -> bool: ...

    def close(self) -> None: ...


@dataclass(kw_only=True, eq=False)
class Job:
    """One request, from the queue to its end."""

    client: str
    """Whose turn it takes."""
    prompt_ids: list[int]
    config: GenerationConfig
    put: Callable[[Event], bool]
    """Leaves pieces, and at last the result or an error, for whoever asked; False when there is no room."""
    ends_with: Exception | None = field(default=None, init=False)
    """Why it is to end before its time; set once, and obeyed before the next step."""


class ClientLeftError(Exception):
    """Nobody waits for this answer any more."""


class QueueFullError(ApiError):
    """More requests than may wait."""

    def __init__(self, num_waiting: int, retry_after_seconds: int) -> None:
        message = f"{num_waiting} requests are waiting already; try again in {retry_after_seconds} s"
        super().__init__(429, message, code="queue_full", retry_after_seconds=retry_after_seconds)


Loaded = tuple[Engine, Batcher]


class Worker:
    """Jobs come from any thread; all that the engine is asked happens in this one."""

    def __init__(self, load: Callable[[], Loaded], max_queue: int) -> None:
        """load: called in the thread, so that whoever starts it can say meanwhile that the model is loading. What it has made is
        closed by whoever gave it."""
        self.engine: Future[Engine] = Future()
        """Done when the model is loaded; its exception says why it could not be."""
        self.figures = Figures()
        self.problem: str | None = None
        """What broke off the last step; None once an answer has ended well again."""
        self._load = load
        self._max_queue = max_queue
        self._max_answers = 1
        self._changed = Condition()
        self._waiting: FairQueue[Job] = FairQueue()
        self._active: dict[Job, Answer] = {}
        self._stopping = False
        self._closing = False
        # A daemon: nothing can end the thread while a model is being loaded, and the process shall be able to.
        self._thread = Thread(target=self._run, name="offload-sirius-worker", daemon=True)

    def start(self) -> None:
        """Load, and work."""
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for their turn."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Jobs whose answers are being written."""
        return len(self._active)

    @property
    def max_answers(self) -> int:
        """Answers that can be written at once."""
        return self._max_answers

    @property
    def is_stopping(self) -> bool:
        """Whether no more jobs are taken."""
        return self._stopping

    def require_room(self) -> None:
        """Whether a job would be taken now, for those who have to prepare one. Raises QueueFullError, ServerStoppingError."""
        with self._changed:
            if self._stopping:
                raise ServerStoppingError
            has_slot = self.num_active + self.num_waiting < self._max_answers
            if self.num_waiting >= self._max_queue and not has_slot:
                raise QueueFullError(self.num_waiting, self._retry_seconds())

    def submit(self, job: Job) -> None:
        """Queue a job. Raises as require_room does."""
        with self._changed:
            self.require_room()
            self._waiting.push(job.client, job)
            self._changed.notify()

    def cancel(self, job: Job, reason: Exception) -> None:
        """End a job before its next step, wherever it is; nothing happens where it has ended."""
        with self._changed:
            job.ends_with = job.ends_with or reason
            if self._waiting.remove(job.client, job):
                job.put(job.ends_with)
            self._changed.notify()

    def stop(self) -> None:
        """Take no more jobs, and tell those that wait; what is being written goes on."""
        with self._changed:
            self._stopping = True
            waiting = [self._waiting.pop() for _ in range(self.num_waiting)]
            self._changed.notify()
        for job in waiting:
            job.put(ServerStoppingError())

    def end_answers(self) -> None:
        """Tell the clients of all that is being written that the server stops."""
        for job in list(self._active):
            self.cancel(job, ServerStoppingError())

    def close(self) -> None:
        """End what is left, and wait for it."""
        self.stop()
        self.end_answers()
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _retry_seconds(self) -> int:
        """When a place in the queue will probably be free."""
        seconds = (self.figures.mean_answer_seconds or 1.0) / self._max_answers
        return max(1, min(MAX_RETRY_SECONDS, round(seconds)))

    def _run(self) -> None:
        try:
            engine, batch = self._load()
        except BaseException as error:
            self.engine.set_exception(error)
            return
        self._max_answers = batch.max_answers
        self.engine.set_result(engine)
        with closing(batch):
            while self._take(batch):
                if self._active:
                    self._step(engine, batch)

    def _take(self, batch: Batcher) -> bool:
        """Wait until there is something to do, and give free slots to those whose turn it is. False: no more will come."""
        with self._changed:
            while not self._waiting and not self._active:
                if self._closing:
                    return False
                self.figures.idle()
                self._changed.wait()
            num_free = self._max_answers - self.num_active
            jobs = [self._waiting.pop() for _ in range(min(num_free, self.num_waiting))]
            # Counted as active before the lock is given back, so that neither `submit` nor `end_answers` misses one.
            began = [(job, self._begin(job, batch)) for job in jobs]
            self._active |= {job: answer for job, answer in began if answer is not None}
        return True

    def _begin(self, job: Job, batch: Batcher) -> Answer | None:
        def on_piece(piece: TextPiece) -> None:
            self.figures.generated_tokens += piece.token_id is not None
            if not job.put(piece):
                job.ends_with = job.ends_with or SlowReaderError()

        try:
            return batch.submit(job.prompt_ids, job.config, on_piece=on_piece)
        except Exception as error:
            self._failed(job, error)
            return None

    def _step(self, engine: Engine, batch: Batcher) -> None:
        for job, answer in self._active.items():
            if job.ends_with is not None:
                answer.cancel()
        try:
            batch.step()
        except Exception as error:
            # Weights that cannot be read, memory that ran out: all answers end, and the next one is tried.
            # Those that were finished before it failed are answers.
            self._end_answered()
            self.problem = " ".join(str(error).split())
            failed, self._active = self._active, {}
            for job, answer in failed.items():
                answer.cancel()  # of which the batch may not have begun
                self._failed(job, error)
        else:
            self._end_answered()
        link = LinkCounters(engine.streamer.copied_nbytes, engine.streamer.busy_seconds)
        self.figures.stepped(link, [answer.stats for answer in self._active.values()])

    def _end_answered(self) -> None:
        done = {job: answer for job, answer in self._active.items() if answer.state == "done"}
        # The slot is free before its client is told, who may look.
        self._active = {job: answer for job, answer in self._active.items() if job not in done}
        for job, answer in done.items():
            if answer.error is not None:
                self._failed(job, answer.error)
                continue
            self.figures.answered(answer.result)
            if job.ends_with is None:
                self.problem = None
            job.put(job.ends_with or answer.result)

    def _failed(self, job: Job, error: Exception) -> None:
        self.figures.answers["error"] += 1
        if not isinstance(error, USER_ERRORS):
            _LOG.error("an answer failed", exc_info=error)
        job.put(error)
