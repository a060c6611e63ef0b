"""The routes in this process: what goes over the wire, and what a failure looks like."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from offload_sirius.engine import Engine
from offload_sirius.engine.batch import Batch
from offload_sirius.errors import WeightReadError
from offload_sirius.model.tokenizer import Tokenizer

from .conftest import NAME, Serve

CHAT: dict[str, Any] = {
    "model": NAME,
    "messages": [{"role": "user", "content": "Tell me."}],
    "max_tokens": 12,
    "temperature": 0,
}
COMPLETION: dict[str, Any] = {"model": NAME, "prompt": "Once", "max_tokens": 12, "temperature": 0}


def events(text: str) -> list[Any]:
    """The data of a stream's events."""
    assert text.endswith("\n\n")
    lines = text[:-2].split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def without_cached(usage: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on what was asked before."""
    return {name: number for name, number in usage.items() if name != "prompt_tokens_details"}


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def test_a_chat_is_answered_with_what_the_engine_writes(client: TestClient, engine: Engine) -> None:
    reply = client.post("/v1/chat/completions", json=CHAT).json()
    expected = engine.generate(CHAT["messages"], max_new_tokens=12)
    assert (reply["object"], reply["model"]) == ("chat.completion", NAME)
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", reply["id"])
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected.text, "refusal": None},
            "finish_reason": "length",
            "logprobs": None,
        }
    ]
    num_prompt = expected.prompt_tokens
    assert reply["usage"]["prompt_tokens"] == num_prompt
    assert reply["usage"]["completion_tokens"] == 12
    assert reply["usage"]["total_tokens"] == num_prompt + 12
    assert reply["figures"]["aal"] is not None


def test_a_completion_continues_the_prompt_as_it_is(client: TestClient, engine: Engine) -> None:
    reply = client.post("/v1/completions", json=COMPLETION).json()
    assert reply["object"] == "text_completion"
    assert reply["choices"][0]["text"] == engine.generate("Once", max_new_tokens=12, chat=False).text
    by_ids = client.post("/v1/completions", json=COMPLETION | {"prompt": engine.model.encode("Once", chat=False)}).json()
    assert by_ids["choices"] == reply["choices"]


@pytest.mark.parametrize(("path", "request_"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_a_stream_joined_is_the_answer_in_one_piece(client: TestClient, path: str, request_: dict[str, Any]) -> None:
    whole = client.post(path, json=request_).json()
    response = client.post(path, json=request_ | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert without_cached(usage["usage"]) == without_cached(whole["usage"])
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [each["finish_reason"] for each in choices] == [None] * (len(choices) - 1) + ["length"]
    if path == "/v1/chat/completions":
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(each["delta"].get("content", "") for each in choices) == whole["choices"][0]["message"]["content"]
    else:
        assert "".join(each["text"] for each in choices) == whole["choices"][0]["text"]


def test_a_stream_says_nothing_of_usage_unless_asked(client: TestClient) -> None:
    *chunks, done = events(client.post("/v1/completions", json=COMPLETION | {"stream": True}).text)
    assert done == "[DONE]"
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


def test_a_stop_string_ends_the_answer_before_it(client: TestClient) -> None:
    text = client.post("/v1/completions", json=COMPLETION).json()["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    choice = client.post("/v1/completions", json=COMPLETION | {"stop": [stop]}).json()["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_one_seed_is_one_text_and_another_seed_another(client: TestClient) -> None:
    def text(seed: int) -> str:
        fields = COMPLETION | {"temperature": 1, "seed": seed}
        return str(client.post("/v1/completions", json=fields).json()["choices"][0]["text"])

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_what_a_prompt_shares_with_an_earlier_one_is_not_computed_again(client: TestClient) -> None:
    first = client.post("/v1/chat/completions", json=CHAT).json()
    said = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    messages = [*CHAT["messages"], said, {"role": "user", "content": "And then?"}]
    usage = client.post("/v1/chat/completions", json=CHAT | {"messages": messages}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1


def test_an_answer_without_a_limit_ends_where_the_context_does(client: TestClient, engine: Engine) -> None:
    fields = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    reply = client.post("/v1/chat/completions", json=fields).json()
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == engine.context + 1


def test_a_prompt_without_room_for_an_answer_is_told_so(client: TestClient) -> None:
    error = error_of(client.post("/v1/completions", json=COMPLETION | {"prompt": [1] * 300}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "300 tokens" in error["message"]
    assert "256" in error["message"]
    error = error_of(client.post("/v1/completions", json=COMPLETION | {"prompt": [1] * 3000}), 400)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("prompt", "said"), [("", "prompt is empty"), ([999999], "outside the vocabulary"), ([-1], "outside the")]
)
def test_a_prompt_that_is_none_is_told_so(client: TestClient, prompt: Any, said: str) -> None:
    assert said in error_of(client.post("/v1/completions", json=COMPLETION | {"prompt": prompt}), 400)["message"]


def test_models_are_the_one_that_is_served_and_its_other_names(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [NAME]
    assert client.get(f"/v1/models/{NAME}").json() == listed["data"][0]
    assert client.get("/v1/models/alias").json()["id"] == "alias"
    assert client.post("/v1/completions", json=COMPLETION | {"model": "alias"}).json()["model"] == "alias"


@pytest.mark.parametrize(
    "name",
    ["gpt-4", "../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "a\r\nX-Injected: 1", "synthetic:tiny", "\0", ""],
)
def test_no_other_model_can_be_named(client: TestClient, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*_: object, **__: object) -> None:
        raise AssertionError("the file system was asked")

    monkeypatch.setattr("offload_sirius_loaders.open_checkpoint", touched)
    monkeypatch.setattr("pathlib.Path.exists", touched)
    error = error_of(client.post("/v1/chat/completions", json=CHAT | {"model": name}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    response = client.get("/v1/models/" + name.replace("\r", "%0d").replace("\n", "%0a").replace("\0", "%00"))
    assert "x-injected" not in response.headers
    if name:
        error_of(response, 404)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/v1/embeddings", 404)],
)
def test_paths_and_methods_that_there_are_not_have_errors_of_the_same_form(
    client: TestClient, method: str, path: str, status: int
) -> None:
    assert error_of(client.request(method, path), status)["type"] == "invalid_request_error"


def test_what_cannot_be_asked_for_is_an_error_with_its_field(client: TestClient) -> None:
    error = error_of(client.post("/v1/chat/completions", json=CHAT | {"n": 3}), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "n", "unsupported_parameter")


def test_a_body_that_is_too_large_is_refused_by_its_length_and_while_it_is_read(serve: Serve) -> None:
    client = serve(max_request_size="1KiB")
    for content in (b"x" * 2000, (b"x" * 100 for _ in range(20))):
        error = error_of(client.post("/v1/chat/completions", content=content), 413)
        assert error["code"] == "request_too_large"
        assert "1.00 KiB" in error["message"]


def test_with_a_key_only_those_who_send_it_are_answered(serve: Serve) -> None:
    client = serve(api_key="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Bearer s\xe9cret"}):
        for path in ("/v1/models", "/metrics", "/v1/figures"):
            response = client.get(path, headers={name: value.encode("latin-1") for name, value in headers.items()})  # type: ignore[arg-type]
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert client.post("/v1/completions", json=COMPLETION, headers={}).status_code == 401
    assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert client.get("/health").status_code == 200
    assert client.get("/").status_code == 200


def test_pages_of_other_sites_are_not_answered(client: TestClient) -> None:
    assert client.post("/v1/completions", json=COMPLETION, headers={"Origin": "http://127.0.0.1"}).status_code == 200
    error = error_of(client.post("/v1/completions", json=COMPLETION, headers={"Origin": "http://evil.example"}), 403)
    assert error["type"] == "permission_error"
    # Not even those whose name has been made to lead here.
    own = {"Origin": "http://evil.example", "Host": "evil.example"}
    assert error_of(client.post("/v1/completions", json=COMPLETION, headers=own), 403)["code"] == "unknown_host"


@pytest.mark.parametrize(("host", "address"), [("Box.Example", "127.0.1.1"), ("127.1", "127.0.0.1"), ("ip6-localhost", "::1")])
def test_a_server_for_this_machine_only_is_called_by_its_own_names_however_it_was_given(
    host: str, address: str, serve: Serve
) -> None:
    client = serve(host=host, address=address)
    error = error_of(client.get("/v1/models", headers={"Host": "evil.example"}), 403)
    assert (error["code"], host in error["message"]) == ("unknown_host", True)
    for name in (host, "localhost:8080", f"[{address}]" if ":" in address else address):
        assert client.get("/v1/models", headers={"Host": name}).status_code == 200


def test_a_server_with_a_key_or_for_other_machines_may_be_called_by_any_name(serve: Serve) -> None:
    key = {"Authorization": "Bearer secret", "Host": "models.example"}
    assert serve(api_key="secret").get("/v1/models", headers=key).status_code == 200
    assert serve(host="0.0.0.0").get("/v1/models", headers={"Host": "models.example"}).status_code == 200


def failing_with(error: Exception, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Have the batch fail in the middle of a step, as many steps from now."""
    advance, num_left = Batch._advance, iter(range(after))

    def fail(batch: Batch, model: Any) -> None:
        if next(num_left, None) is None:
            raise error
        advance(batch, model)

    monkeypatch.setattr(Batch, "_advance", fail)


def test_a_failure_of_the_engine_is_a_500_and_health_tells(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(WeightReadError("model.gguf: cannot be read"), monkeypatch, after=1)
    error = error_of(client.post("/v1/completions", json=COMPLETION | {"max_tokens": 200}), 500)
    assert (error["message"], error["type"], error["code"]) == ("model.gguf: cannot be read", "server_error", "engine_error")
    health = client.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failing")
    monkeypatch.undo()
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200
    assert client.get("/health").json() == {"status": "ok"}


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_with(WeightReadError("model.gguf: cannot be read"), monkeypatch, after=2)
    fields = COMPLETION | {"stream": True, "max_tokens": 200}
    first, *_, last = events(client.post("/v1/completions", json=fields).text)
    assert first["choices"]
    assert last["error"]["message"] == "model.gguf: cannot be read"


def test_a_bug_is_a_500_that_tells_the_client_nothing_of_it(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing_with(KeyError("inner secret"), monkeypatch, after=0)
    error = error_of(client.post("/v1/completions", json=COMPLETION), 500)
    assert error["code"] == "internal_error"
    assert "inner secret" not in error["message"]
    assert "inner secret" in caplog.text


def test_requests_that_are_answered_together_have_the_answers_of_their_own(client: TestClient, engine: Engine) -> None:
    def ask(number: int) -> str:
        fields = COMPLETION | {"prompt": [number + 1] * (number + 2), "temperature": number % 2, "seed": number}
        return str(client.post("/v1/completions", json=fields).json()["choices"][0]["text"])

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    assert len(set(alone)) == 8


def test_log_probabilities_of_a_chat_are_those_of_its_tokens(client: TestClient) -> None:
    asked = CHAT | {"logprobs": True, "top_logprobs": 2}
    choice = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 12
    for token in content:
        best, second = token["top_logprobs"]
        assert best == {name: token[name] for name in ("token", "logprob", "bytes")}, "greedy takes the likeliest"
        assert second["logprob"] <= best["logprob"] < 0
        assert token["bytes"] in (None, list(token["token"].encode()))
    chunks = events(client.post("/v1/chat/completions", json=asked | {"stream": True}).text)[:-1]
    streamed = [token for each in chunks for token in (each["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [token["token"] for token in streamed] == [token["token"] for token in content]
    assert [token["logprob"] for token in streamed] == pytest.approx([token["logprob"] for token in content], abs=1e-4)
    plain = client.post("/v1/chat/completions", json=CHAT | {"logprobs": True}).json()["choices"][0]
    assert all(token["top_logprobs"] == [] for token in plain["logprobs"]["content"])


def test_log_probabilities_of_a_completion_have_their_places_in_the_text(client: TestClient) -> None:
    whole = client.post("/v1/completions", json=COMPLETION | {"logprobs": 3}).json()["choices"][0]
    found = whole["logprobs"]
    assert {len(each) for each in found.values()} == {12}
    assert all(len(top) <= 3 for top in found["top_logprobs"])
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        # Bytes that were no character come out with the next token that is one.
        assert "\N{REPLACEMENT CHARACTER}" in token or token in whole["text"][offset : offset + len(token) + 3]
    chunks = events(client.post("/v1/completions", json=COMPLETION | {"logprobs": 3, "stream": True}).text)[:-1]
    offsets = [place for each in chunks for place in (each["choices"][0]["logprobs"] or {"text_offset": []})["text_offset"]]
    assert offsets == found["text_offset"]


def test_figures_say_that_a_threshold_is_greedy_and_it_answers_without_a_temperature(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = serve()
    assert client.get("/v1/figures").json()["is_greedy"] is False
    lossy = replace(engine.config, decoding=replace(engine.config.decoding, accept="threshold"))
    monkeypatch.setattr(engine, "config", lossy)
    assert client.get("/v1/figures").json()["is_greedy"] is True
    without = {name: value for name, value in CHAT.items() if name != "temperature"}
    assert client.post("/v1/chat/completions", json=without).status_code == 200
    error = error_of(client.post("/v1/chat/completions", json=CHAT | {"temperature": 0.7}), 400)
    assert "threshold" in error["message"]


def test_figures_and_metrics_count_what_was_done(client: TestClient) -> None:
    usage = client.post("/v1/completions", json=COMPLETION).json()["usage"]
    client.post("/v1/completions", json=COMPLETION | {"n": 3})
    client.get("/no/such/path")
    figures = client.get("/v1/figures").json()
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert figures["tokens"] == {"prompt": usage["prompt_tokens"], "cached": cached, "generated": usage["completion_tokens"]}
    assert (figures["queue"], figures["active"], figures["answers"]) == (0, 0, {"length": 1})
    assert figures["mean_aal"] >= 1
    assert (figures["tokens_per_second"], figures["aal"], figures["acceptance"]) == (None, None, None)
    assert figures["last_answer"]["tokens_per_second"] > 0
    metrics = client.get("/metrics").text
    assert f'offload_sirius_tokens_total{{kind="generated"}} {usage["completion_tokens"]}.0' in metrics
    assert 'offload_sirius_requests_total{endpoint="/v1/completions",status="200"} 1.0' in metrics
    assert 'offload_sirius_requests_total{endpoint="/v1/completions",status="400"} 1.0' in metrics
    assert 'offload_sirius_requests_total{endpoint="other",status="404"} 1.0' in metrics
    assert 'offload_sirius_answers_total{reason="length"} 1.0' in metrics
    assert "offload_sirius_average_advancement_length " in metrics


def test_the_page_may_ask_nobody_but_this_server(client: TestClient) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe-inline" not in policy
    assert not re.search(r"""\b(src|href|action)\s*=\s*['"](?!data:)|@import|url\(|//(?!www\.w3\.org)""", response.text)


@pytest.mark.parametrize(
    ("template", "status", "said"),
    [
        (None, 400, "the model has no chat template; send a prompt to /v1/completions"),
        ("{{ raise_exception('no system here') }}", 400, "does not accept this conversation: no system here"),
        ("{{ ''.__class__.__mro__ }}", 400, "does not accept this conversation"),
        ("{% for %}", 500, "the chat template is not valid"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error_of_one_line(
    client: TestClient, engine: Engine, monkeypatch: pytest.MonkeyPatch, template: str | None, status: int, said: str
) -> None:
    tokenizer = Tokenizer(model_name="m", codec=engine.model.tokenizer._codec, special_tokens={}, chat_template=template)
    monkeypatch.setattr(engine, "model", replace(engine.model, tokenizer=tokenizer))
    assert said in error_of(client.post("/v1/chat/completions", json=CHAT), status)["message"]
