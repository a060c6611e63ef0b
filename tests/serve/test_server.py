"""A real server process, asked by OpenAI's own client and by sockets that behave badly."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .conftest import Process, serving

SLOW = ("--device-memory", "25.1MiB", "--link-gbps", "0.01", "--mode", "full", "--max-context", "2000")
"""Some tokens a second, over an emulated link."""

MESSAGES: Any = [{"role": "user", "content": "Tell me."}]


@pytest.fixture(scope="module")
def server(chatty: Path) -> Iterator[Process]:
    """Fast, with a key."""
    with serving("--model", str(chatty), "--served-name", "tiny", "--api-key", "secret") as server:
        yield server


@pytest.fixture(scope="module")
def slow(chatty: Path) -> Iterator[Process]:
    """Slow enough to be left in the middle of an answer."""
    with serving("--model", str(chatty), "--served-name", "tiny", "--max-queue", "3", *SLOW) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0, timeout=60)


def chat(client: openai.OpenAI, **settings: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0} | settings
    )


def figures(server: Process) -> Any:
    request = urllib.request.Request(server.url + "/v1/figures", headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def wait_until(server: Process, **expected: int) -> None:
    deadline = time.monotonic() + 60
    while (found := {name: figures(server)[name] for name in expected}) != expected:
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def test_chat_and_completion_whole_and_streamed_are_the_same_text(client: openai.OpenAI) -> None:
    whole = chat(client)
    text = whole.choices[0].message.content
    assert len(text) > 10
    assert whole.usage.completion_tokens == 20
    stream = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == text
    assert stream[-1].usage.total_tokens == whole.usage.total_tokens
    settings: Any = {"model": "tiny", "prompt": "Once", "max_tokens": 20, "temperature": 0}
    completion = client.completions.create(**settings).choices[0]
    assert completion.finish_reason == "length"
    assert "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)) == completion.text


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "offload-sirius"


def test_one_seed_gives_one_text_and_a_stop_string_ends_it(client: openai.OpenAI) -> None:
    text = chat(client, temperature=1, seed=5).choices[0].message.content
    assert chat(client, temperature=1, seed=5).choices[0].message.content == text
    assert chat(client, temperature=1, seed=6).choices[0].message.content != text
    stop = text[5:8]
    stopped = chat(client, temperature=1, seed=5, stop=stop).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (text[: text.index(stop)], "stop")


def test_extensions_are_given_as_extra_body(client: openai.OpenAI) -> None:
    greedy = chat(client).choices[0].message.content
    assert chat(client, temperature=1.5, seed=1, extra_body={"top_k": 1}).choices[0].message.content == greedy


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI, server: Process) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="gpt-4")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, n=2)
    assert (bad.value.param, bad.value.type) == ("n", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[1] * 5000)
    assert long.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=server.url + "/v1", api_key="guess", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        chat(stranger)


def test_a_client_that_leaves_a_stream_or_a_whole_answer_frees_its_turn(slow: Process) -> None:
    client = openai.OpenAI(base_url=slow.url + "/v1", api_key="any", max_retries=0, timeout=60)
    stream = chat(client, stream=True, max_tokens=1500)
    next(stream)
    wait_until(slow, active=1, queue=0)
    stream.close()
    wait_until(slow, active=0)
    with pytest.raises(openai.APITimeoutError):
        chat(client, max_tokens=1500, timeout=1)
    wait_until(slow, active=0, queue=0)
    assert set(figures(slow)["answers"]) == {"interrupted"}


def test_more_than_may_wait_are_told_to_come_again(slow: Process) -> None:
    client = openai.OpenAI(base_url=slow.url + "/v1", api_key="any", max_retries=0, timeout=60)
    first = chat(client, stream=True, max_tokens=1500)
    next(first)
    waiting = [ask(slow, max_tokens=1500) for _ in range(3)]
    wait_until(slow, active=1, queue=3)
    with pytest.raises(openai.RateLimitError) as full:
        chat(client)
    assert full.value.code == "queue_full"
    assert int(full.value.response.headers["retry-after"]) >= 1
    first.close()
    for each in waiting:
        each.close()
    wait_until(slow, active=0, queue=0)


def ask(server: Process, body: bytes | None = None, **settings: Any) -> socket.socket:
    """A connection that has sent a request, and reads nothing."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    content = body if body is not None else json.dumps({"model": "tiny", "messages": MESSAGES} | settings).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer secret\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def test_a_client_that_does_not_read_is_let_go_and_holds_up_nobody(server: Process, client: openai.OpenAI) -> None:
    assert figures(server)["answers"].get("interrupted") is None
    # With all that can be asked for it is more than sockets hold.
    with ask(server, max_tokens=2000, temperature=0, stream=True, logprobs=True, top_logprobs=20):
        assert chat(client).choices[0].finish_reason == "length"
        wait_until(server, active=0)
        assert figures(server)["answers"]["interrupted"] == 1


@pytest.mark.parametrize(
    ("body", "status"), [(b"[" * 100_000, 400), (b'{"model": "\xff"}', 400), (b"x" * (5 << 20), 413), (b"{}", 400)]
)
def test_bodies_that_are_none_have_an_answer(server: Process, body: bytes, status: int) -> None:
    with ask(server, body) as connection:
        assert connection.recv(4096).startswith(f"HTTP/1.1 {status} ".encode())


def test_a_stopping_server_finishes_what_it_writes_and_tells_who_waits(chatty: Path) -> None:
    with serving("--model", str(chatty), "--served-name", "tiny", *SLOW) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=60)
        stream = chat(client, stream=True, max_tokens=12)
        next(stream)
        waiting = ask(server, max_tokens=5)
        wait_until(server, active=1, queue=1)
        server.signal(signal.SIGTERM)
        assert waiting.recv(4096).startswith(b"HTTP/1.1 503 ")
        waiting.close()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        code, said = server.ended()
    assert code == 0
    assert "Traceback" not in said


def test_when_the_grace_is_over_answers_end_with_an_error_and_the_server_with_0(chatty: Path) -> None:
    with serving("--model", str(chatty), "--served-name", "tiny", "--grace", "0.5", *SLOW) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=60)
        stream = chat(client, stream=True, max_tokens=1500)
        next(stream)
        server.signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert server.ended()[0] == 0


def test_a_second_signal_ends_at_once(chatty: Path) -> None:
    with serving("--model", str(chatty), "--served-name", "tiny", *SLOW) as server, ask(server, max_tokens=1500) as waiting:
        wait_until(server, active=1)
        server.signal(signal.SIGTERM)
        # Signals that come together are one: the first has been obeyed when nobody is let in any more.
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                ask(server, b"{}").close()
        assert server.process.poll() is None
        server.signal(signal.SIGTERM)
        assert server.ended()[0] == 130
        assert waiting.recv(4096) == b""


LOADING = """
import sys, time
from offload_sirius.config import ServeConfig
from offload_sirius.serve.server import bind, serve

config = ServeConfig(port=0)
listener = bind(config)
print(f"http://127.0.0.1:{listener.getsockname()[1]}: m is ready", file=sys.stderr, flush=True)
give_up = lambda: print("given up", file=sys.stderr)
serve(listener, lambda: time.sleep(600), config, ("m",), on_ready=lambda: None, on_abort=give_up)
"""


def test_while_the_model_loads_the_server_says_so_and_ends_when_it_is_told_to() -> None:
    server = Process(command=[sys.executable, "-c", LOADING])
    server.wait_until_ready()
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0, timeout=60)
    with pytest.raises(openai.InternalServerError) as early:
        chat(client, model="m")
    assert (early.value.status_code, early.value.code) == (503, "model_loading")
    with pytest.raises(urllib.error.HTTPError) as health:
        urllib.request.urlopen(server.url + "/health", timeout=20)
    assert (health.value.code, json.load(health.value)) == (503, {"status": "loading"})
    server.signal(signal.SIGTERM)
    code, said = server.ended()
    assert code == 0
    assert said.endswith("given up\n")
