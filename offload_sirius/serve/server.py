"""From a socket to a stopped server: who listens, what the signals do, and in which order things end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from offload_sirius.config import ServeConfig
from offload_sirius.errors import ConfigError
from offload_sirius.serve.app import Service, make_app, memory_of
from offload_sirius.serve.metrics import Metrics
from offload_sirius.serve.worker import Loaded, Worker

SEND_BUFFER_NBYTES = 64 << 10
"""What the kernel keeps for a client that does not read; left to itself, it keeps megabytes for each."""

STALLED_SECONDS = 60
"""After which the kernel drops a connection whose other end takes nothing."""

FLUSH_SECONDS = 3.0
"""For clients to read the end of their answers, when all of these have ended."""


def bind(config: ServeConfig) -> socket.socket:
    """A socket that listens there. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {config.host}: not found: {error}; give an address such as 127.0.0.1") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    # A port whose last server has just ended is free; one that somebody listens on is not.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections take over what the socket they come from has.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_NBYTES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
    try:
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        where = f"{config.host} port {config.port}"
        raise ConfigError(f"{where}: cannot listen there: {error.strerror}; give another --port or --host") from None
    return listener


def names_of_model(model: str, own_name: str, served: tuple[str, ...]) -> tuple[str, ...]:
    """Names for clients: those that were given, else what the model was asked for by and calls itself. Never a path."""
    if served:
        return served
    return tuple(dict.fromkeys((own_name,) if Path(model).exists() else (model, own_name)))


def serve(
    listener: socket.socket,
    load: Callable[[], Loaded],
    config: ServeConfig,
    names: tuple[str, ...],
    *,
    on_ready: Callable[[], None],
    on_abort: Callable[[], None],
) -> int:
    """Answer until a signal comes. Returns 0. Raises what made loading fail.

    load: brings the model, in a thread of its own; on_ready: called when it has. The first SIGINT or SIGTERM lets running answers
    end, the second ends all at once, with 130. on_abort: called before the process ends so.
    """
    worker = Worker(load, config.max_queue)
    metrics = Metrics(worker)
    address = listener.getsockname()[0]
    service = Service(worker=worker, config=config, names=names, created=int(time.time()), metrics=metrics, address=address)
    asyncio.run(_Server(service, on_ready, on_abort).run(listener))
    if worker.engine.done() and (error := worker.engine.exception()) is not None:
        raise error
    worker.close()
    worker.engine.result().close()
    return 0


class _Uvicorn(uvicorn.Server):
    """Leaves signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn: its own way ends the process by the signal that it has obeyed."""
        yield


class _Server:
    """The event loop's side of a server."""

    def __init__(self, service: Service, on_ready: Callable[[], None], on_abort: Callable[[], None]) -> None:
        self._service = service
        self._worker = service.worker
        self._on_ready = on_ready
        self._on_abort = on_abort
        self._http = _Uvicorn(
            uvicorn.Config(
                make_app(service),
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                # Tracebacks are logged by the routes; what else uvicorn complains of is clients that left.
                log_level="critical",
                server_header=False,
                timeout_graceful_shutdown=int(service.config.grace + FLUSH_SECONDS) + 1,
            )
        )

    async def run(self, listener: socket.socket) -> None:
        """Until stopped."""
        loop = asyncio.get_running_loop()
        for each in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(each, self._stop)
        self._worker.engine.add_done_callback(lambda _: loop.call_soon_threadsafe(self._loaded))
        self._worker.start()
        await self._http.serve(sockets=[listener])

    def _loaded(self) -> None:
        if self._worker.engine.exception() is not None:
            self._http.should_exit = True
            return
        self._service.metrics.memory = memory_of(self._worker.engine.result())
        self._on_ready()

    def _stop(self) -> None:
        if self._worker.is_stopping or not self._worker.engine.done():
            # Nothing to finish, or nobody wants it finished; a thread that loads or computes cannot be asked to end.
            code = 130 if self._worker.is_stopping else 0
            self._on_abort()
            os._exit(code)
        self._worker.stop()
        self._http.should_exit = True
        asyncio.get_running_loop().call_later(self._service.config.grace, self._worker.end_answers)
