"""What a client is told when a request fails: a status, and a body as OpenAI's clients read it."""

from __future__ import annotations

from typing import Any

from offload_sirius.errors import USER_ERRORS, ConfigError, PromptError

CONTEXT_LENGTH = "context_length_exceeded"


class ApiError(Exception):
    """One request cannot be answered. The message is one line: what was found, what is needed."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        """param: the field of the request that is at fault; retry_after_seconds: when to come again."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds

    @property
    def body(self) -> dict[str, Any]:
        """See error_body."""
        return error_body(self.status, str(self), self.code, self.param)

    @property
    def headers(self) -> dict[str, str]:
        """What a client has to know besides."""
        headers = {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


class ServerStoppingError(ApiError):
    """The answer is not written, or not to its end, as the server stops."""

    def __init__(self) -> None:
        super().__init__(503, "the server is stopping; send the request again when it is back", code="server_stopping")


class SlowReaderError(ApiError):
    """A client that does not read what it asked for."""

    def __init__(self) -> None:
        super().__init__(408, "the answer was not read as fast as it was written; read faster", code="slow_reader")


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """{"error": {"message", "type", "param", "code"}}"""
    return {"error": {"message": message, "type": _type_of(status), "param": param, "code": code}}


def as_api_error(error: Exception) -> ApiError:
    """An error of the engine as its client is told of it. What is at fault in a request is 400, all else is 500."""
    if isinstance(error, ApiError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, PromptError | ConfigError):
        return ApiError(400, message, code="invalid_value")
    if isinstance(error, USER_ERRORS):
        return ApiError(500, message, code="engine_error")
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def _type_of(status: int) -> str:
    types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return types.get(status, "server_error" if status >= 500 else "invalid_request_error")
