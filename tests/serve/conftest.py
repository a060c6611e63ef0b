"""What the tests of the server share: a tiny model that chats, and the server around it, in this process or in one of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import tokenizers
from starlette.testclient import TestClient
from tokenizers import decoders, models, pre_tokenizers, trainers

import offload_sirius
from offload_sirius.config import ServeConfig
from offload_sirius.engine import Engine
from offload_sirius.serve.app import Service, make_app
from offload_sirius.serve.metrics import Metrics
from offload_sirius.serve.worker import Worker

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
NAME = "tiny-chat"


@pytest.fixture(scope="session")
def chatty(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with random weights, and a tokenizer with a chat template."""
    directory = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_directory, directory)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # As many tokens as the model has, so that each of them is text.
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text(encoding="utf-8")], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def engine(chatty: Path) -> Iterator[Engine]:
    """That model, loaded."""
    with offload_sirius.load(str(chatty), device="cpu", threads=1, max_context=256, parallel=2) as engine:
        yield engine


Serve = Callable[..., TestClient]


@pytest.fixture
def serve(engine: Engine) -> Iterator[Serve]:
    """The routes in this process; settings are those of ServeConfig. address: what it would listen on, where that is not host."""
    workers: list[Worker] = []

    def serve(address: str | None = None, **settings: object) -> TestClient:
        config = ServeConfig(**settings)  # type: ignore[arg-type]
        worker = Worker(lambda: (engine, engine.batch()), config.max_queue)
        workers.append(worker)
        worker.start()
        worker.engine.result(timeout=60)
        service = Service(
            worker=worker,
            config=config,
            names=(NAME, "alias"),
            created=0,
            metrics=Metrics(worker),
            address=address or config.host,
        )
        return TestClient(make_app(service), base_url="http://127.0.0.1", raise_server_exceptions=False)

    yield serve
    for worker in workers:
        worker.close()


@pytest.fixture
def client(serve: Serve) -> TestClient:
    """The routes with all defaults."""
    return serve()


COMMAND = (sys.executable, "-m", "offload_sirius", "serve", "--port", "0", "--device", "cpu", "--threads", "1")


class Process:
    """`offload-sirius serve` in a process of its own."""

    def __init__(self, *arguments: str, command: Sequence[str] = COMMAND) -> None:
        # Its threads shall not spin while they wait: tests share the machine.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            [*command, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        self.lines: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def wait_until_ready(self) -> None:
        """Until the model is loaded."""
        assert self._ready.wait(timeout=120), self.lines
        assert self.url, self.lines

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it has said, once it has ended."""
        code = self.process.wait(timeout=60)
        self._reading.join(timeout=60)
        return code, "".join(self.lines)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if match := re.match(r"(http://\S+): \S+ is ready", line):
                self.url = match[1]
                self._ready.set()
        self._ready.set()


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    """A server that is ready, ended at the end."""
    server = Process(*arguments)
    try:
        server.wait_until_ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.ended()
