"""The body of a request, read within limits: what is too large or too slow is refused before it is parsed."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from offload_sirius.serve.errors import ApiError
from offload_sirius.units import format_size

BODY_SECONDS = 60.0
"""In which a body must have come."""


async def read_body(request: Request, max_nbytes: int) -> bytes:
    """All of it. Raises ApiError."""
    # A length may be wrong, or missing: it only saves reading what is too large by its own word.
    length = request.headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > max_nbytes:
        raise _too_large(max_nbytes)
    try:
        return await asyncio.wait_for(_read(request, max_nbytes), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body has not come within {BODY_SECONDS:.0f} s; send it faster", code="body_too_slow") from None
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the body had come", code="incomplete_body") from None


async def _read(request: Request, max_nbytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_nbytes:
            raise _too_large(max_nbytes)
    return bytes(body)


def _too_large(max_nbytes: int) -> ApiError:
    message = (
        f"the body is larger than {format_size(max_nbytes)}; send less, or start the server with a larger --max-request-size"
    )
    return ApiError(413, message, code="request_too_large")
