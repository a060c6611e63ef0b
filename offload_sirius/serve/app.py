"""The routes: what each answers, who may ask, and what a failure looks like. Knows no engine but through the worker."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace

import torch
from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offload_sirius import machine
from offload_sirius.config import GenerationConfig, ServeConfig
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece
from offload_sirius.engine import Engine
from offload_sirius.errors import CheckpointError, PromptError
from offload_sirius.serve.body import read_body
from offload_sirius.serve.errors import CONTEXT_LENGTH, ApiError, as_api_error, error_body
from offload_sirius.serve.exchange import EventStream, Exchange
from offload_sirius.serve.figures import Memory
from offload_sirius.serve.mailbox import Event, Mailbox
from offload_sirius.serve.metrics import Metrics
from offload_sirius.serve.page import PAGE, PAGE_HEADERS
from offload_sirius.serve.replies import DONE, Json, Reply, event
from offload_sirius.serve.requests import Asked, read_chat, read_completion
from offload_sirius.serve.worker import ClientLeftError, Job, Worker

_LOG = logging.getLogger(__name__)

MAILBOX_CAPACITY = 512
"""Pieces that wait for a client's connection; a client that lets more of them wait is let go."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names that lead to this machine from this machine only."""

CLIENT_LEFT = 499
"""Nobody reads this status; it is for the metrics, where nginx' number for it is well known."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """What the routes answer with."""

    worker: Worker
    config: ServeConfig
    names: tuple[str, ...]
    """Names that requests may call the model by; the first is listed."""
    created: int
    """When the server was started, in seconds of Unix time."""
    metrics: Metrics
    address: str
    """What it listens on, whatever name that was given by."""

    @property
    def engine(self) -> Engine:
        """The loaded model. Raises ApiError while there is none."""
        loaded = self.worker.engine
        if not loaded.done() or loaded.exception() is not None:
            raise ApiError(503, "the model is loading; try again soon", code="model_loading", retry_after_seconds=2)
        return loaded.result()


def make_app(service: Service) -> ASGIApp:
    """All routes, their errors and their counting."""
    app = FastAPI(title="offload-sirius", openapi_url=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.include_router(_open_routes(service))
    app.include_router(_api_routes(service))
    return Counting(app, service.metrics)


def _open_routes(service: Service) -> APIRouter:
    """For everyone: they tell nothing of what is asked and answered."""
    routes = APIRouter()

    @routes.get("/")
    async def page() -> Response:
        return Response(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    @routes.get("/health")
    async def health() -> Response:
        status = _health(service.worker)
        return JSONResponse(status, status_code=200 if status["status"] == "ok" else 503)

    return routes


def _api_routes(service: Service) -> APIRouter:
    """For those who have the key, where there is one."""

    async def allowed(request: Request) -> None:
        _require_own_page(service, request)
        _require_key(service.config.api_key, request)

    routes = APIRouter(dependencies=[Depends(allowed)])

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/v1/figures")
    async def figures() -> Response:
        return JSONResponse(figures_json(service))

    @routes.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, service.names[0])]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        _require_model(service, name)
        return JSONResponse(_model(service, name))

    @routes.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, read_chat)

    @routes.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await _answer(service, request, read_completion)

    return routes


async def _answer(service: Service, request: Request, read: Callable[[bytes], Asked]) -> Response:
    body = await read_body(request, service.config.max_request_nbytes)
    asked = read(body)
    _require_model(service, asked.model)
    engine = service.engine
    service.worker.require_room()
    # Templates and tokenizers take their time on long prompts, in which others are served.
    prompt_ids = await asyncio.to_thread(_encode, engine, asked)
    mailbox = Mailbox(MAILBOX_CAPACITY if asked.stream else None)
    client = asked.client or (request.client.host if request.client else "")
    job = Job(client=client, prompt_ids=prompt_ids, config=_generation(engine, asked, len(prompt_ids)), put=mailbox.put)
    service.worker.submit(job)
    exchange = Exchange(service.worker, job, mailbox, request.receive)
    with_logprobs = asked.num_top_logprobs is not None
    reply = Reply(model=asked.model, is_chat=asked.is_chat, tokenizer=engine.model.tokenizer, with_logprobs=with_logprobs)
    try:
        if not asked.stream:
            pieces, result = await exchange.result()
            exchange.end()
            return JSONResponse(reply.whole(pieces, result))
        # What is wrong before the first piece still has a status of its own.
        first = await exchange.take()
    except BaseException as error:
        exchange.end()
        if isinstance(error, ClientLeftError):
            return Response(status_code=CLIENT_LEFT)
        if isinstance(error, Exception):
            raise as_api_error(error) from error
        raise
    return EventStream(exchange, _events(exchange, first, reply, include_usage=asked.include_usage))


async def _events(exchange: Exchange, events: list[Event], reply: Reply, *, include_usage: bool) -> AsyncIterator[bytes]:
    """A stream from its first piece to its end. Pieces that come together go together."""
    if (beginning := reply.first()) is not None:
        yield event(beginning)
    text_offset = 0
    while True:
        pieces = [each for each in events if isinstance(each, TextPiece)]
        if (chunk := reply.pieces(pieces, text_offset)) is not None:
            yield event(chunk)
        text_offset += sum(len(piece.text) for piece in pieces)
        if isinstance(result := events[-1], Generation):
            break
        try:
            events = await exchange.take()
        except ClientLeftError:
            return
        except Exception as error:  # what the worker has ended the answer with
            yield event(as_api_error(error).body)
            return
    yield event(reply.last(result))
    if include_usage:
        yield event(reply.usage(result))
    yield DONE


def _encode(engine: Engine, asked: Asked) -> list[int]:
    if asked.is_chat and not engine.model.tokenizer.has_chat_template:
        raise ApiError(400, "the model has no chat template; send a prompt to /v1/completions", param="messages")
    if not asked.prompt:
        raise ApiError(400, "prompt is empty; send at least one token", code="invalid_value", param="prompt")
    try:
        return engine.model.encode(asked.prompt, chat=False)
    except PromptError as error:
        too_long = "positions" in str(error)
        param = "messages" if asked.is_chat else "prompt"
        raise ApiError(400, str(error), code=CONTEXT_LENGTH if too_long else "invalid_value", param=param) from None
    except CheckpointError as error:  # a chat template that is none
        raise as_api_error(error) from None


def _generation(engine: Engine, asked: Asked, num_prompt: int) -> GenerationConfig:
    """The settings of an answer, as long as there is room for. Raises ApiError."""
    room = engine.context - num_prompt + 1
    if room < 1:
        message = f"the prompt has {num_prompt} tokens and the server has room for {engine.context}, the answer included"
        raise ApiError(400, f"{message}; shorten it, or start the server with a larger --max-context", code=CONTEXT_LENGTH)
    default = 0.0 if _is_greedy(engine) else 1.0
    temperature = default if asked.temperature is None else asked.temperature
    return GenerationConfig(
        sampling=replace(asked.sampling, temperature=temperature),
        max_new_tokens=min(asked.max_new_tokens or room, room),
        stop=asked.stop,
        logprobs=asked.num_top_logprobs,
    )


def _is_greedy(engine: Engine) -> bool:
    """Whether all its answers are: a threshold cannot be anything else."""
    return engine.config.decoding.mode == "sirius" and engine.config.decoding.accept == "threshold"


def figures_json(service: Service) -> Json:
    """What the page shows: GET /v1/figures."""
    worker, figures = service.worker, service.worker.figures
    rates, loaded = figures.rates, worker.engine
    is_loaded = loaded.done() and loaded.exception() is None
    return {
        "model": service.names[0],
        "is_greedy": is_loaded and _is_greedy(loaded.result()),
        "status": _health(worker)["status"],
        "queue": worker.num_waiting,
        "active": worker.num_active,
        "max_answers": worker.max_answers,
        "tokens_per_second": rates.tokens_per_second,
        "aal": rates.aal,
        "acceptance": rates.acceptance,
        "link": {
            "gbytes_per_second": rates.link_gbytes_per_second,
            "busy_share": rates.link_busy_share,
            "copied_bytes": figures.link.copied_nbytes,
        },
        "tokens": {"prompt": figures.prompt_tokens, "cached": figures.cached_tokens, "generated": figures.generated_tokens},
        "answers": dict(figures.answers),
        "mean_aal": figures.mean_aal,
        "last_answer": None if figures.last is None else figures.last.as_json(),
        "memory": None if service.metrics.memory is None else service.metrics.memory.as_json(),
    }


def memory_of(engine: Engine) -> Memory:
    """What the plan says, and what there is."""
    device = engine.device
    is_cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if is_cuda else machine.total_host_nbytes()
    return Memory(
        device_budget_nbytes=engine.config.device_size.nbytes or total,
        device_bill=engine.plan.device_bill,
        host_bill=engine.plan.host_bill,
    )


def _health(worker: Worker) -> Json:
    loaded = worker.engine
    if not loaded.done():
        return {"status": "loading"}
    if worker.is_stopping:
        return {"status": "stopping"}
    if worker.problem is not None:
        return {"status": "failing", "problem": worker.problem}
    return {"status": "ok"}


def _model(service: Service, name: str) -> Json:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "offload-sirius"}


def _require_model(service: Service, name: str) -> None:
    """A server has the model that it was started with, and looks for no other."""
    if name not in service.names:
        message = f"the model {name[:100]!r} does not exist; this server has {service.names[0]}"
        raise ApiError(404, message, code="model_not_found", param="model")


def _require_own_page(service: Service, request: Request) -> None:
    """Pages of other sites must not have a visitor's browser ask this server."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise ApiError(403, f"requests from pages of {origin[:100]!r} are not answered; ask from the server's own page")
    # A name of somebody's own may lead to this machine, and make a page of theirs look like the server's.
    name, own = (request.url.hostname or "").lower(), service.config.host
    is_guarded = service.config.api_key is None and ipaddress.ip_address(service.address).is_loopback
    if is_guarded and name not in (*LOOPBACK, own.lower(), service.address):
        message = f"this server is not known as {name[:100]!r}; ask for {own}, or start it with --api-key"
        raise ApiError(403, message, code="unknown_host")


def _require_key(api_key: str | None, request: Request) -> None:
    if api_key is None:
        return
    found = request.headers.get("authorization", "")
    if not hmac.compare_digest(found.encode(), f"Bearer {api_key}".encode()):
        raise ApiError(401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_http_error(request: Request, error: Exception) -> Response:
    """A path or a method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return JSONResponse(error_body(error.status_code, message), status_code=error.status_code, headers=error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse(as_api_error(error).body, status_code=500)


class Counting:
    """Counts requests by endpoint and status, and says of every answer that it is what its type says."""

    ENDPOINTS = frozenset(("/", "/health", "/metrics", "/v1/figures", "/v1/models", "/v1/chat/completions", "/v1/completions"))

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Paths are the clients' words: only our own become labels.
        endpoint = scope["path"] if scope["path"] in self.ENDPOINTS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count(endpoint, message["status"])
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            await send(message)

        await self._app(scope, receive, counted)
