"""Passes of a loaded model one by one, each timed by itself: for benchmarks that ask what a pass costs, and not an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from offload_sirius.bench.stream import without_residents
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.decode.model import Ask, Pass
from offload_sirius.decode.tree import DraftTree
from offload_sirius.engine import Engine, NoProgress, build, open_model
from offload_sirius.engine.placement import place
from offload_sirius.engine.planning import Planned
from offload_sirius.model.transformer import TokenTree

NUM_PROMPT = 16
NUM_WARMUPS = 2
"""Passes before those that count: the first finds an empty ring, the second one that was filled for it."""

KV_DEVIATION = 0.02
"""Of keys and values that nobody has computed: numbers of the size of the synthetic weights."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Passes of one kind, one behind the other."""

    seconds: list[float]
    """Of each."""
    nbytes: int
    """Bytes of layers that crossed the link for one of them, by the counters."""


class SinglePasses:
    """Passes over what the first slot of an engine holds. Nothing that they append is kept."""

    def __init__(self, engine: Engine, num_positions: int = NUM_PROMPT) -> None:
        """A prompt is computed, so that neurons are chosen; positions behind it are filled with random keys and values."""
        self._engine, self._streamed = engine, engine._streamed  # single passes are no part of an engine's surface
        self._slot = self._streamed.slots[0]
        engine.use_threads(prompt=False)
        self._streamed.prepare(engine.config.decoding)
        self._slot.begin(0)
        num_prompt = min(NUM_PROMPT, num_positions)
        self._run("prefill", range(1, num_prompt + 1), following="full")
        self._fill(num_positions - num_prompt)
        self._num_positions = num_positions

    def _fill(self, num_positions: int) -> None:
        """Pages that were never written are all the same one: zeros would be read faster than keys."""
        cache = self._slot.cache
        for each in cache.tensors:
            each.narrow(3, cache.length, num_positions).normal_(std=KV_DEVIATION)
        cache.advance(num_positions)
        self._slot.appended("prefill", [1] * num_positions)

    def timed(self, kind: Pass, num_passes: int, *, num_tokens: int = 1, branches: int = 1, each: int = 1) -> Timed:
        """Passes that are all of this kind. branches: more than one makes a tree of the tokens. each: passes that are timed
        together, and of which one has the mean."""
        for _ in range(NUM_WARMUPS):
            self.step(kind, num_tokens, branches)
        before = self._engine.streamer.pass_nbytes[kind]
        seconds = []
        for _ in range(num_passes):
            began = time.perf_counter()
            for _ in range(each):
                self.step(kind, num_tokens, branches)
            seconds.append((time.perf_counter() - began) / each)
        nbytes = self._engine.streamer.pass_nbytes[kind] - before
        return Timed(seconds=seconds, nbytes=nbytes // (num_passes * each))

    def timed_once(self, kind: Pass, num_tokens: int = 1, branches: int = 1) -> Timed:
        """One pass, in turn with others."""
        before, began = self._engine.streamer.pass_nbytes[kind], time.perf_counter()
        self.step(kind, num_tokens, branches)
        seconds = time.perf_counter() - began
        return Timed(seconds=[seconds], nbytes=self._engine.streamer.pass_nbytes[kind] - before)

    def step(self, kind: Pass, num_tokens: int = 1, branches: int = 1, following: Pass | None = None) -> None:
        """One pass. following: what will come next, the same by default."""
        tree = None if branches == 1 else self._tree(num_tokens, branches)
        self._run(kind, [1 + index % 200 for index in range(num_tokens)], following=following or kind, tree=tree)
        self._slot.keep(self._num_positions)

    def windows(self, num_tokens: int, num_windows: int) -> tuple[Timed, Timed]:
        """Windows of so many tokens in a line, one behind another that warms up -> all of each, and its correction alone."""
        self._window(num_tokens)
        before = dict(self._engine.streamer.pass_nbytes)
        drafts, corrections = zip(*(self._window(num_tokens) for _ in range(num_windows)), strict=True)
        after = self._engine.streamer.pass_nbytes
        draft_nbytes, correction_nbytes = ((after[kind] - before[kind]) // num_windows for kind in ("draft", "correction"))
        whole = [draft + correction for draft, correction in zip(drafts, corrections, strict=True)]
        return (
            Timed(seconds=whole, nbytes=draft_nbytes + correction_nbytes),
            Timed(seconds=list(corrections), nbytes=correction_nbytes),
        )

    def _window(self, num_tokens: int) -> tuple[float, float]:
        """Seconds of the drafts, and of their correction."""
        began = time.perf_counter()
        for left in reversed(range(num_tokens - 1)):
            self._run("draft", [1], following="draft" if left else "correction")
        drafted = time.perf_counter()
        self._slot.keep(self._num_positions)
        self.step("correction", num_tokens, following="draft")
        return drafted - began, time.perf_counter() - drafted

    def _tree(self, num_nodes: int, branches: int) -> TokenTree:
        tree = DraftTree(1)
        for node in range(1, num_nodes):
            tree.graft((node - 1) // branches, node)
        return tree.layout(range(num_nodes), start=self._num_positions, device=self._slot.device)

    def _run(self, kind: Pass, token_ids: Sequence[int], *, following: Pass, tree: TokenTree | None = None) -> None:
        asked = Ask(slot=self._slot, kind=kind, token_ids=list(token_ids), following=following, tree=tree)
        self._streamed.run([asked])[0][-1].argmax().item()  # waits for the device


def rounds(engine: Engine, num_rounds: int) -> Timed:
    """Rounds in which as many answers as there are places get a token each, all by one pass.

    Prompts are computed in one pass where the engine's context has room for all of them, two tokens each.
    """
    batch = engine.batch()
    for number in range(engine.config.parallel):
        batch.submit([1 + number, 1], max_new_tokens=1 + NUM_WARMUPS + num_rounds, ignore_eos=True, reuse=False)
    for _ in range(NUM_WARMUPS):
        batch.step()
    before, seconds = engine.streamer.pass_nbytes["full"], list[float]()
    for _ in range(num_rounds):
        began = time.perf_counter()
        batch.step()
        seconds.append(time.perf_counter() - began)
    nbytes = engine.streamer.pass_nbytes["full"] - before
    batch.close()
    return Timed(seconds=seconds, nbytes=nbytes // num_rounds)


@contextmanager
def loaded(
    model: str, *, streamed: bool, context: int, decoding: DecodingConfig, **settings: Any
) -> Iterator[tuple[Engine, Planned]]:
    """An engine and its plan, all layers streamed or, where there is room, resident."""
    opened = open_model(model)
    config = EngineConfig(model=model, max_context=context, decoding=decoding, **settings)
    if streamed:
        config = without_residents(opened, config)
    planned = place(opened.checkpoint, config).planned
    with build(opened, config, NoProgress()) as engine:
        yield engine, planned
