"""Token ids to text while they arrive, and stop strings found across the borders of tokens. Knows no model and no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_BROKEN = "\N{REPLACEMENT CHARACTER}"
"""What decoding shows for bytes that are no character: not yet, or never."""
_MAX_UTF8_NBYTES = 4
_MAX_WINDOW = 64
"""Tokens after which bytes that have not become a character are taken to be none."""
_KEPT_WINDOW = 16
"""Tokens kept then: enough to hold the begun character, if the last bytes are one, and to find its beginning."""


class Decoder(Protocol):
    """What the detokenizer needs of a tokenizer."""

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def is_hidden(self, token_id: int) -> bool:
        """Whether decode passes over the id."""


class Detokenizer:
    """Turns ids into text one by one: the pieces together are what decoding all ids at once gives.

    A token's text depends on its neighbours: half a character becomes whole, a leading space shows only where something stands
    before it. So a short window of ids is decoded each time, and the part that was given out before is cut off; the cost of a
    token does not grow with the text. The one exception to "together": SentencePiece shows a run of byte tokens as broken
    altogether when any of it is, and characters of the run that were given out before cannot be taken back.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_context = 0
        """Ids at the start of the window that are there only to be neighbours: their text has been given out."""
        self._num_given = 0
        """Characters of the window's text that have been given out."""

    def push(self, token_id: int) -> str:
        """The text that this id makes certain: empty while a character is incomplete."""
        if self._tokenizer.is_hidden(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        num_certain = len(text.rstrip(_BROKEN))
        overdue = len(self._window) > _MAX_WINDOW
        if overdue:
            # At most this many characters can be the bytes of one that has begun.
            num_certain = max(num_certain, len(text) - (_MAX_UTF8_NBYTES - 1))
        piece = text[self._num_given : num_certain]
        self._num_given = max(self._num_given, num_certain)
        if num_certain == len(text):
            self._slide(self._num_context, 0)
        elif overdue:
            self._slide(len(self._window) - _KEPT_WINDOW, len(text) - num_certain)
        return piece

    def finish(self) -> str:
        """The rest, with U+FFFD for a character that was never completed."""
        piece = self._tokenizer.decode(self._window)[self._num_given :]
        self._window, self._num_context, self._num_given = [], 0, 0
        return piece

    def _slide(self, num_dropped: int, num_pending: int) -> None:
        """Drop ids whose text has been given out; num_pending characters at the end have not."""
        self._window = self._window[num_dropped:]
        self._num_context = len(self._window)
        self._num_given = max(0, len(self._tokenizer.decode(self._window)) - num_pending)


class StopMatcher:
    """Ends a text before the first stop string in it, however the text is cut into pieces.

    First is the one that begins first. Where one is complete and another that began before it may still become so, the matter
    waits for more text.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        """stops: texts that are not empty."""
        self._stops = stops
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; what is pushed after that is ignored."""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that no stop string can begin in any more, whether one was found)."""
        if self.stopped:
            return "", True
        text = self._held + text
        found, begun = self._find(text), self._find_begun(text)
        self.stopped = found < len(text) and found <= begun
        end = min(found, begun)
        self._held = "" if self.stopped else text[end:]
        return text[:end], self.stopped

    def flush(self) -> str:
        """What was held back, now that no more text comes; ends before a stop string that had to wait, see `stopped`."""
        text, self._held = self._held, ""
        found = self._find(text)
        self.stopped = self.stopped or found < len(text)
        return text[:found]

    def _find(self, text: str) -> int:
        """Where the first complete stop string begins; the text's length where there is none."""
        places = (text.find(stop) for stop in self._stops)
        return min((place for place in places if place >= 0), default=len(text))

    def _find_begun(self, text: str) -> int:
        """Where the first stop string begins that the text ends in the middle of; the text's length where there is none."""
        longest = max(map(len, self._stops), default=1)
        for place in range(max(0, len(text) - longest + 1), len(text)):
            rest = text[place:]
            if any(len(rest) < len(stop) and stop.startswith(rest) for stop in self._stops):
                return place
        return len(text)
