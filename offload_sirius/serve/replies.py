"""The JSON of answers, whole and in pieces, as https://platform.openai.com/docs/api-reference has it. Knows no HTTP.

Beyond that, whoever is told the usage is told `figures` too: seconds, acceptance and what crossed the link.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from offload_sirius import __version__
from offload_sirius.decode.result import Generation
from offload_sirius.decode.stream import TextPiece
from offload_sirius.serve.figures import AnswerFigures

Json = dict[str, Any]

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """What replies need of a tokenizer."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...

    def is_hidden(self, token_id: int) -> bool: ...


FINGERPRINT = f"offload-sirius-{__version__}"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the pieces and the end of one answer look like."""

    model: str
    is_chat: bool
    tokenizer: Decoder
    with_logprobs: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[TextPiece], result: Generation) -> Json:
        """An answer in one piece."""
        choice: Json = {"index": 0, "finish_reason": result.finish_reason, "logprobs": self._logprobs(pieces)}
        message = {"role": "assistant", "content": result.text, "refusal": None}
        choice |= {"message": message} if self.is_chat else {"text": result.text}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": [choice]} | _figures(result)

    def first(self) -> Json | None:
        """What a stream begins with."""
        return self._chunk({"role": "assistant", "content": ""}) if self.is_chat else None

    def pieces(self, pieces: Sequence[TextPiece], text_offset: int) -> Json | None:
        """Some pieces of a stream; None where they add nothing. text_offset: characters before them."""
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs(pieces, text_offset)
        return self._chunk({"content": text}, logprobs=logprobs) if text or logprobs else None

    def last(self, result: Generation) -> Json:
        """The end of a stream: why it ends."""
        return self._chunk({}, finish_reason=result.finish_reason)

    def usage(self, result: Generation) -> Json:
        """Behind the end of a stream, for those who want to know."""
        return self._head(self._chunk_kind) | {"choices": []} | _figures(result)

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _chunk(self, delta: Json, *, finish_reason: str | None = None, logprobs: Json | None = None) -> Json:
        choice: Json = {"index": 0, "finish_reason": finish_reason, "logprobs": logprobs}
        choice |= {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        return self._head(self._chunk_kind) | {"choices": [choice]}

    def _logprobs(self, pieces: Sequence[TextPiece], text_offset: int = 0) -> Json | None:
        """Those of the tokens of the text; None where nobody wants them, or there are none. An end token is no text."""
        offsets = accumulate((len(piece.text) for piece in pieces), initial=text_offset)
        tokens = [
            (piece.token_id, piece.logprob, piece.top_logprobs, offset)
            for piece, offset in zip(pieces, offsets, strict=False)
            if piece.token_id is not None and piece.logprob is not None and not self.tokenizer.is_hidden(piece.token_id)
        ]
        if not self.with_logprobs or not tokens:
            return None
        if self.is_chat:
            content = [
                self._token(token_id, logprob) | {"top_logprobs": [self._token(*each) for each in top]}
                for token_id, logprob, top, _ in tokens
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": [self._text(token_id) for token_id, *_ in tokens],
            "token_logprobs": [logprob for _, logprob, *_ in tokens],
            "top_logprobs": [{self._text(each): logprob for each, logprob in top} for _, _, top, _ in tokens],
            "text_offset": [offset for *_, offset in tokens],
        }

    def _token(self, token_id: int, logprob: float) -> Json:
        text = self._text(token_id)
        # A token may be part of a character, whose bytes the tokenizer does not tell.
        return {"token": text, "logprob": logprob, "bytes": None if _BROKEN in text else list(text.encode())}

    def _text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id], skip_special_tokens=False)

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
        "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
    }
    return {"usage": usage, "figures": AnswerFigures.of(result).as_json()}
