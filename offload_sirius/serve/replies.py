"""The JSON of answers, whole and in pieces, as https://platform.openai.com/docs/api-reference has it. Knows no HTTP.

Beyond that, whoever is told the usage is told `figures` too: seconds, acceptance and what crossed the link.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from offload_sirius import __version__
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece
from offload_sirius.serve.figures import AnswerFigures

Json = dict[str, Any]

FINGERPRINT = f"offload-sirius-{__version__}"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the pieces and the end of one answer look like."""

    model: str
    is_chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, result: Generation) -> Json:
        """An answer in one piece."""
        if self.is_chat:
            message = {"role": "assistant", "content": result.text, "refusal": None}
            choice: Json = {"index": 0, "message": message, "finish_reason": result.finish_reason, "logprobs": None}
        else:
            choice = {"index": 0, "text": result.text, "finish_reason": result.finish_reason, "logprobs": None}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": [choice]} | _figures(result)

    def first(self) -> Json | None:
        """What a stream begins with."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self.is_chat else None

    def pieces(self, pieces: Sequence[TextPiece]) -> Json | None:
        """Some pieces of a stream; None where they add nothing."""
        text = "".join(piece.text for piece in pieces)
        return self._chunk({"content": text}, None) if text else None

    def last(self, result: Generation) -> Json:
        """The end of a stream: why it ends."""
        return self._chunk({}, result.finish_reason)

    def usage(self, result: Generation) -> Json:
        """Behind the end of a stream, for those who want to know."""
        return self._head(self._chunk_kind) | {"choices": []} | _figures(result)

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, delta: Json, finish_reason: str | None) -> Json:
        choice: Json = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        choice |= {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        return self._head(self._chunk_kind) | {"choices": [choice]}

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }


def event(data: Json) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""What every stream that was written to its end ends with."""


def _figures(result: Generation) -> Json:
    usage = {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.new_tokens,
        "total_tokens": result.prompt_tokens + result.new_tokens,
    }
    return {"usage": usage, "figures": AnswerFigures.of(result).as_json()}
