"""Answers that are written together: every pass of the weights serves all of them.

A round gives free places to answers that wait, has their prompts computed in one pass, and then takes all answers a step further:
by a full pass, or by a window of drafts and its correction. Windows are in step: those that have drafted enough wait for the
others, and one correction verifies all. Each answer is the one that it would be by itself, as the loops of decode/ are the same
and random numbers depend on seed and position; where drafts decide, in mode sparse and with a threshold, it depends on the others
by the neurons that are chosen for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from offload_sirius.config import DecodingConfig, GenerationConfig
from offload_sirius.decode.emitted import Emitted
from offload_sirius.decode.loop import next_event
from offload_sirius.decode.model import Ask
from offload_sirius.decode.result import FinishReason, Generation
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.steps import Event, Reply, Steps, WindowGiven, WindowWanted
from offload_sirius.decode.stream import TextPiece
from offload_sirius.decode.window import choose_together
from offload_sirius.engine.kv_slot import KVSlot
from offload_sirius.engine.opened import Prompt
from offload_sirius.engine.request import Request
from offload_sirius.errors import ConfigError

if TYPE_CHECKING:
    from offload_sirius.engine.engine import Engine
    from offload_sirius.engine.streamed import StreamedModel

State = Literal["waiting", "active", "done"]


class Answer:
    """One answer of a batch."""

    def __init__(self, engine: Engine, request: Request, on_piece: Callable[[TextPiece], None] | None) -> None:
        """Made by `Batch.submit`. on_piece: is given each piece of text."""
        self.request = request
        self.state: State = "waiting"
        self.error: Exception | None = None
        """What ended it, where that was an error."""
        self.cancelled = False
        self.event: Event | None = None
        """What it waits for: a pass or a window."""
        self._engine = engine
        self._writer = engine.writer(request)
        self._counters = engine.counters()
        self._on_piece = on_piece
        self._slot: KVSlot | None = None
        self._steps: Steps | None = None
        self._result: Generation | None = None

    @property
    def result(self) -> Generation:
        """The figures, when it is done; those of the link are of all that crossed since it was submitted. Raises RuntimeError
        before, and the error that ended it."""
        if self.error is not None:
            raise self.error
        if self._result is None:
            raise RuntimeError("the answer is not finished: call the batch's step until it is done")
        return self._result

    @property
    def stats(self) -> DecodeStats:
        """What has been counted so far."""
        return self.request.stats

    def cancel(self) -> None:
        """Have it ended before the next pass. May be called from another thread."""
        self.cancelled = True

    def begin(self, slot: KVSlot) -> None:
        """It has a place, which holds a beginning of its prompt: no more than is to be used."""
        self.state, self._slot = "active", slot
        slot.is_busy = True
        self.request.num_cached = slot.length
        self._steps = self._engine.steps(self.request, slot)

    def go_on(self, reply: Reply = None) -> None:
        """Take it to the next pass or window that it needs, or to its end. An error of whoever gets its text ends it alone."""
        assert self._steps is not None
        while isinstance(event := next_event(self._steps, reply), Emitted):
            reply = None
            try:
                self._write(event)
            except Exception as error:
                self.fail(error)
                return
            if self._writer.ended is not None:
                self.end(self._writer.ended)
                return
        assert event is not None, "an answer goes on until its writer has enough"
        self.event = event

    def _write(self, token: Emitted) -> None:
        for piece in self._writer.push(token):
            if self._on_piece is not None:
                self._on_piece(piece)

    def end(self, reason: FinishReason) -> None:
        """It is done."""
        self._leave()
        self._writer.outcome.finish_reason = reason
        self._result = self._engine.result_of(self._writer.outcome, self._counters, self.request)

    def fail(self, error: Exception) -> None:
        """It is done, by an error."""
        self._leave()
        self.error = error

    def _leave(self) -> None:
        self.state, self.event = "done", None
        if self._steps is not None:
            self._steps.close()
        if self._slot is not None:
            self._slot.leave()


class Batch:
    """Answers that are written together. One thread at a time may use it."""

    def __init__(self, engine: Engine) -> None:
        """Made by `Engine.batch`."""
        self._engine = engine
        self._waiting: deque[Answer] = deque()
        self._active: list[Answer] = []
        self._closed = False

    @property
    def max_answers(self) -> int:
        """Answers that can be active."""
        return self._engine.config.parallel

    @property
    def num_active(self) -> int:
        """Answers that have a place."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Answers that wait for one."""
        return len(self._waiting)

    def submit(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_piece: Callable[[TextPiece], None] | None = None,
        **settings: Any,
    ) -> Answer:
        """Queue an answer. prompt, config, settings: as for Engine.stream. on_piece: is called by `step` with each piece of text.

        Raises ConfigError and PromptError for what the model was not loaded for.
        """
        if self._closed:
            raise RuntimeError("the batch is closed: make another one")
        request = self._engine.request(prompt, config or GenerationConfig(), settings)
        found, needed = request.decoding.draft_keep, self._engine.config.decoding.draft_keep
        if request.decoding.drafts and found != needed:
            raise ConfigError(
                f"answers of a batch share their drafts: the model was loaded with draft_keep {needed} and is asked for {found}"
            )
        answer = Answer(self._engine, request, on_piece)
        self._waiting.append(answer)
        return answer

    def step(self) -> bool:
        """One round: gives free places to answers that wait, and takes all active ones a pass or a window further.

        Calls on_piece for what became text. False when there was nothing to do. An error of a single answer, its callback's for
        one, ends that one only. Any other error, of reading or of memory, and an interruption end all active ones and are raised;
        the batch can be used further, those that wait still do. Raises RuntimeError while answers of another batch have places.
        """
        self._drop_cancelled()
        if not self._waiting and not self._active:
            return False
        self._engine.require_no_batch("those of another one are", num_own=len(self._active))
        try:
            with self._engine.answering(self) as model:
                self._engine.use_threads(prompt=True)
                self._join(model)
                self._engine.use_threads(prompt=False)
                self._advance(model)
        except Exception as error:
            self._end_all(error)
            raise
        except BaseException:
            self._end_all(None)
            raise
        return True

    def close(self) -> None:
        """End what is left where it is."""
        self._closed = True
        for answer in (*self._active, *self._waiting):
            answer.end("interrupted")
        self._active.clear()
        self._waiting.clear()

    def _join(self, model: StreamedModel) -> None:
        """Give places to answers that wait, in order, and have what is new of their prompts computed in one pass.

        No more tokens at once than a single prompt may have: there is memory for so many.
        """
        joining, room = list[Answer](), model.slots[0].cache.capacity
        while self._waiting and (free := [slot for slot in model.slots if not slot.is_busy]):
            request = self._waiting[0].request
            prompt_ids, reuses = request.prompt_ids, request.reuses and model.reuses
            nearest = max(model.slots, key=lambda slot: slot.shared(prompt_ids))
            num_cached = nearest.shared(prompt_ids) if reuses else 0
            room -= len(prompt_ids) - num_cached
            if joining and room < 0:
                break
            # A text of which little is shared is left for whoever goes on with it, as long as there are other places.
            goes_on = not nearest.is_busy and 2 * num_cached > len(nearest.token_ids)
            slot = nearest if goes_on else min(free, key=lambda slot: slot.left_at)
            slot.begin(num_cached if slot is nearest else 0)
            if num_cached and slot is not nearest:
                slot.take(nearest, num_cached)
            answer = self._waiting.popleft()
            self._active.append(answer)
            answer.begin(slot)
            answer.go_on()
            joining.append(answer)
        model.prepare(self._decoding())
        self._pass(model, joining)

    def _decoding(self) -> DecodingConfig:
        """What all passes are made for: as the model was loaded, but without the prior where one drafts that shall not depend on
        it."""
        decoding = self._engine.config.decoding
        asked = [answer.request.decoding for answer in self._active]
        return decoding if all(each.with_prior for each in asked if each.drafts) else replace(decoding, prior=False)

    def _advance(self, model: StreamedModel) -> None:
        """A window of those that draft, and a full pass for all that want one."""
        self._give_windows()
        while drafting := self._wanting("draft"):
            self._pass(model, drafting)
            # Drafts that nobody corrects never end: those go along with the others, or take one step each round.
            if all(answer.request.decoding.mode == "sparse" for answer in self._wanting("draft")):
                break
        self._pass(model, self._wanting("correction", "full"))

    def _give_windows(self) -> None:
        """Tell those that begin a window how large it may be."""
        wanting = [(answer, event) for answer in self._active if isinstance(event := answer.event, WindowWanted)]
        num_nodes = self._engine.config.step_rows // max(len(self._active), 1)
        windows = choose_together([event.chooser for _, event in wanting])
        for (answer, _), window in zip(wanting, windows, strict=True):
            answer.go_on(WindowGiven(window=window, num_nodes=num_nodes))

    def _wanting(self, *kinds: str) -> list[Answer]:
        return [answer for answer in self._active if isinstance(answer.event, Ask) and answer.event.kind in kinds]

    def _pass(self, model: StreamedModel, answers: Sequence[Answer]) -> None:
        """One pass for all of these that are still wanted, which then go on."""
        self._drop_cancelled()
        asks = [(answer, event) for answer in answers if isinstance(event := answer.event, Ask)]
        if not asks:
            return
        logits = model.run([ask for _, ask in asks])[::-1]
        for answer, _ in asks:
            answer.go_on(logits.pop())  # which is nobody else's any more
        self._active = [answer for answer in self._active if answer.state == "active"]

    def _drop_cancelled(self) -> None:
        for answer in (*self._active, *self._waiting):
            if answer.cancelled:
                answer.end("interrupted")
        self._active = [answer for answer in self._active if answer.state == "active"]
        self._waiting = deque(answer for answer in self._waiting if answer.state == "waiting")

    def _end_all(self, error: Exception | None) -> None:
        """End all active answers, by an error or an interruption."""
        for answer in self._active:
            if answer.state == "done":
                continue
            if error is None:
                answer.end("interrupted")
            else:
                answer.fail(error)
        self._active.clear()
