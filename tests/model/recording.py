"""A recorder that needs no GPU: it writes down every operation of torch with the very tensors it had, and carries them out again.

What a number of the host decided while recording stays decided, as in a graph of kernels; and like those it may not wait for the
device, which is to read a number from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
"""Operations whose result the host must know before it goes on."""


class Tape(TorchDispatchMode):
    """Operations in order. Results are written over those of the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in READS:
            raise RuntimeError(f"{func.name()} waits for the device, which records")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()
    def play(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            for place, found in zip(tensors_of(recorded), tensors_of(func(*args, **kwargs)), strict=True):
                if found.data_ptr() != place.data_ptr():  # views, and what was computed in place
                    place.copy_(found)


def tensors_of(result: Any) -> list[Tensor]:
    """Of an operation's results those that are tensors."""
    results = result if isinstance(result, tuple | list) else (result,)
    return [each for each in results if isinstance(each, Tensor)]


class TapeRecorder:
    """Satisfies engine.captured.Recorder."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_played = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()  # warm-up
        with Tape() as tape:
            work()
        self.num_recorded += 1

        def play() -> None:
            self.num_played += 1
            tape.play()

        return play
