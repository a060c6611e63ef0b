"""The thread that owns the batch, around a batch whose steps the test makes."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest

from offload_sirius.config import GenerationConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece
from offload_sirius.errors import ConfigError, WeightReadError
from offload_sirius.serve.errors import ServerStoppingError, SlowReaderError
from offload_sirius.serve.mailbox import Event
from offload_sirius.serve.worker import ClientLeftError, Job, QueueFullError, Worker

from .scripted import ENGINE, ScriptedAnswer, ScriptedBatch


class Client:
    """Sends one job and keeps what comes back."""

    def __init__(self, worker: Worker, num_tokens: int, name: str = "client", room: int = 1000) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self._room = room
        self.job = Job(client=name, prompt_ids=[num_tokens], config=GenerationConfig(), put=self._put)
        worker.submit(self.job)

    def _put(self, event: Event) -> bool:
        self._room -= isinstance(event, TextPiece)
        if self._room < 0 and isinstance(event, TextPiece):
            return False
        self.events.put(event)
        return True

    def next(self) -> Event:
        return self.events.get(timeout=20)

    def end(self) -> Event:
        """The last event."""
        while isinstance(event := self.next(), TextPiece):
            pass
        assert self.events.empty()
        return event


@pytest.fixture
def batch() -> ScriptedBatch:
    return ScriptedBatch()


@pytest.fixture
def worker(batch: ScriptedBatch) -> Iterator[Worker]:
    worker = Worker(lambda: (ENGINE, batch), max_queue=2)
    worker.start()
    worker.engine.result(timeout=20)
    yield worker
    batch.run_free()
    worker.close()


def test_an_answer_comes_in_pieces_and_ends_with_its_figures(worker: Worker, batch: ScriptedBatch) -> None:
    client = Client(worker, 2)
    batch.make_step()
    assert isinstance(client.next(), TextPiece)
    batch.make_step()
    assert isinstance(client.next(), TextPiece)
    result = client.next()
    assert isinstance(result, Generation)
    assert result.text == "xx"
    assert worker.num_active == 0
    assert worker.figures.generated_tokens == 2
    assert worker.figures.answers == {"stop": 1}


def test_no_more_answers_are_begun_than_there_are_slots_and_clients_take_turns(worker: Worker, batch: ScriptedBatch) -> None:
    first = Client(worker, 1, "busy")
    while worker.num_active == 0:
        pass
    second, other = Client(worker, 1, "busy"), Client(worker, 1, "other")
    assert (worker.num_active, worker.num_waiting) == (1, 2)
    for client in (first, second, other):
        batch.make_step()
        assert isinstance(client.end(), Generation)


def test_who_finds_the_queue_full_is_told_when_to_come_again(worker: Worker) -> None:
    Client(worker, 5)
    while worker.num_active == 0:
        pass
    waiting = [Client(worker, 1) for _ in range(2)]
    with pytest.raises(QueueFullError, match="2 requests are waiting already; try again in 1 s") as caught:
        Client(worker, 1)
    assert caught.value.status == 429
    assert caught.value.headers == {"Retry-After": "1"}
    worker.cancel(waiting[0].job, ClientLeftError())
    Client(worker, 1)


def test_a_client_that_leaves_frees_its_slot_within_one_step(worker: Worker, batch: ScriptedBatch) -> None:
    leaving, next_one = Client(worker, 100), Client(worker, 1)
    batch.make_step()
    worker.cancel(leaving.job, ClientLeftError())
    # The step that may have begun meanwhile, and the one that it is taken note of in.
    batch.make_step()
    batch.make_step()
    batch.make_step()
    assert isinstance(leaving.end(), ClientLeftError)
    assert isinstance(next_one.end(), Generation)


def test_a_client_that_leaves_the_queue_is_never_begun(worker: Worker, batch: ScriptedBatch) -> None:
    first, leaving = Client(worker, 1), Client(worker, 100)
    worker.cancel(leaving.job, ClientLeftError())
    batch.make_step()
    assert isinstance(first.end(), Generation)
    assert isinstance(leaving.end(), ClientLeftError)
    assert (worker.num_active, worker.num_waiting) == (0, 0)


def test_a_client_that_does_not_read_is_let_go_and_holds_up_nobody(worker: Worker, batch: ScriptedBatch) -> None:
    slow, other = Client(worker, 100, room=1), Client(worker, 1)
    for _ in range(4):
        batch.make_step()
    assert isinstance(slow.end(), SlowReaderError)
    assert isinstance(other.end(), Generation)


def test_a_step_that_fails_ends_its_answers_and_the_next_one_is_written(worker: Worker, batch: ScriptedBatch) -> None:
    failing = Client(worker, 2)
    batch.error = WeightReadError("weights: gone")
    batch.make_step()
    assert str(failing.end()) == "weights: gone"
    assert worker.problem == "weights: gone"
    well = Client(worker, 1)
    batch.make_step()
    assert isinstance(well.end(), Generation)
    assert worker.problem is None
    assert worker.figures.answers == {"error": 1, "stop": 1}


def test_an_answer_that_was_finished_before_its_step_failed_is_an_answer(worker: Worker, batch: ScriptedBatch) -> None:
    finished = Client(worker, 1)
    batch.error, batch.fails_late = WeightReadError("weights: gone"), True
    batch.make_step()
    assert isinstance(finished.end(), Generation)
    assert worker.figures.answers == {"stop": 1}


def test_answers_that_end_as_a_step_fails_are_cancelled(
    worker: Worker, batch: ScriptedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = list[ScriptedAnswer]()
    submit = batch.submit
    monkeypatch.setattr(batch, "submit", lambda *given, **named: answers.append(submit(*given, **named)) or answers[-1])
    failing = Client(worker, 3)
    batch.error = WeightReadError("weights: gone")
    batch.make_step()
    assert str(failing.end()) == "weights: gone"
    assert [answer.result.finish_reason for answer in answers] == ["interrupted"]


def test_what_the_batch_refuses_fails_alone(worker: Worker, batch: ScriptedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("not planned for")

    monkeypatch.setattr(batch, "submit", refuse)
    assert str(Client(worker, 1).end()) == "not planned for"
    monkeypatch.undo()
    client = Client(worker, 1)
    batch.make_step()
    assert isinstance(client.end(), Generation)


def test_a_stopping_worker_tells_who_waits_and_finishes_what_is_being_written(worker: Worker, batch: ScriptedBatch) -> None:
    running, waiting = Client(worker, 2), Client(worker, 1)
    batch.make_step()
    worker.stop()
    assert isinstance(waiting.end(), ServerStoppingError)
    with pytest.raises(ServerStoppingError):
        Client(worker, 1)
    batch.make_step()
    assert isinstance(running.end(), Generation)


def test_when_the_grace_is_over_running_answers_end_with_an_error(worker: Worker, batch: ScriptedBatch) -> None:
    running = Client(worker, 100)
    batch.make_step()
    worker.stop()
    worker.end_answers()
    batch.make_step()
    batch.run_free()
    assert isinstance(running.end(), ServerStoppingError)


def test_a_model_that_cannot_be_loaded_is_the_futures_error() -> None:
    def load() -> None:
        raise ConfigError("no such thing")

    worker = Worker(load, max_queue=1)  # type: ignore[arg-type]
    worker.start()
    with pytest.raises(ConfigError, match="no such thing"):
        worker.engine.result(timeout=20)
    worker.close()
