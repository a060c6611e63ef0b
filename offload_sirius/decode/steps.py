"""What passes between an answer that is being written and whoever runs the model for it: events one way, replies the other.

The loops of the three modes are generators of events. They ask for passes and do not carry them out, so that one answer can be
written by itself, or many in step with each other, by the same loops. Knows no model.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from offload_sirius.decode.emitted import Emitted
from offload_sirius.decode.model import Ask
from offload_sirius.decode.window import WindowChooser


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowWanted:
    """A window begins. The reply says how large it may be; other answers may have theirs at the same time."""

    chooser: WindowChooser


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowGiven:
    """The reply."""

    window: int
    num_nodes: int
    """Tokens that the correction may have at most, two or more."""


Event = Emitted | WindowWanted | Ask
Reply = Tensor | WindowGiven | None
"""Logits of the pass that was asked for; None behind a token."""
Steps = Generator[Event, Reply, None]
"""An answer: begun with `send(None)`."""


def logits_of(ask: Ask) -> Generator[Event, Reply, Tensor]:
    """Ask for a pass -> logits float32 [S, V]."""
    logits = yield ask
    assert isinstance(logits, Tensor), logits
    return logits


def next_window(chooser: WindowChooser) -> Generator[Event, Reply, WindowGiven]:
    """Ask for a window."""
    given = yield WindowWanted(chooser=chooser)
    assert isinstance(given, WindowGiven), given
    return given
