"""The way of a token in each of the three modes. Knows the model only as logits, and text only through ids.

    full     prefill, choose, emit, step
    sparse   the same with sparse steps
    sirius   prefill, choose, emit; then windows: draft, look up, correct, emit

The KV cache may hold a beginning of the prompt: of that nothing is computed again. All are lazy: a token is emitted before the
pass that would follow it is asked for, so that nothing is computed for a token nobody wants. `alone` carries out what one of them
asks for; where several are written together, somebody else does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Literal

from torch import Tensor

from offload_sirius.config import MAX_TREE_NODES, MIN_WINDOW, DecodingConfig
from offload_sirius.decode.accept import Acceptance, AcceptanceRule
from offload_sirius.decode.correct import Corrector
from offload_sirius.decode.draft import Drafter
from offload_sirius.decode.emitted import Emitted
from offload_sirius.decode.logprobs import emitted
from offload_sirius.decode.lookup import Lookup
from offload_sirius.decode.model import Ask, Model, Pass, Slot
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats, Origin
from offload_sirius.decode.steps import Event, Reply, Steps, WindowGiven, WindowWanted, logits_of, next_window
from offload_sirius.decode.tree import DraftTree
from offload_sirius.decode.window import WindowChooser, fit_window
from offload_sirius.trace import Tracer, during

Tokens = Generator[Emitted, None, None]


def alone(model: Model, steps: Steps) -> Tokens:
    """The tokens of one answer that is written by itself."""
    with closing(steps):
        reply: Reply = None
        while (event := next_event(steps, reply)) is not None:
            reply = None
            if isinstance(event, Emitted):
                yield event
            elif isinstance(event, WindowWanted):
                reply = WindowGiven(window=event.chooser.choose(), num_nodes=MAX_TREE_NODES)
            else:
                reply = model.run([event])[0]


def next_event(steps: Steps, reply: Reply) -> Event | None:
    """What follows the reply; None at the end."""
    try:
        return steps.send(reply)
    except StopIteration:
        return None


def decode_full(
    slot: Slot,
    sampler: Sampler,
    prompt_ids: Sequence[int],
    stats: DecodeStats,
    tracer: Tracer | None = None,
    num_alternatives: int | None = None,
) -> Steps:
    """The tokens that follow the prompt, by the full model, one pass each, without end: the caller stops.

    num_alternatives: see `emitted`.
    """
    return _one_by_one(slot, "full", sampler, prompt_ids, stats, tracer, num_alternatives)


def decode_sparse(
    slot: Slot, sampler: Sampler, prompt_ids: Sequence[int], stats: DecodeStats, tracer: Tracer | None = None
) -> Steps:
    """The same by sparse steps, which nobody corrects; only the first token is the full model's, which computes the prompt."""
    return _one_by_one(slot, "draft", sampler, prompt_ids, stats, tracer, None)


def decode_sirius(
    slot: Slot,
    sampler: Sampler,
    prompt_ids: Sequence[int],
    *,
    decoding: DecodingConfig,
    end_token_ids: frozenset[int],
    max_new_tokens: int,
    stats: DecodeStats,
    tracer: Tracer | None = None,
    clock: Callable[[], float] = time.perf_counter,
    eps: float | None = None,
    rule: AcceptanceRule | None = None,
    num_alternatives: int | None = None,
) -> Steps:
    """The tokens that follow the prompt, drafted by the sparse model and corrected by the full one, a window at once.

    Ends by itself: with max_new_tokens, or with an end token, which is emitted. Only corrected tokens are. The KV cache needs
    room for the prompt and all new tokens but the last; trees are made smaller where it has no more.
    clock: seconds; times passes for the choice of the window. eps: of the compute dtype, to count near ties by; None does not.
    rule: decides what stands of a draft, instead of the one that the settings name; nothing is looked up then.
    num_alternatives: see `emitted`. Raises WeightReadError where logits are no numbers.
    """
    sequence, limit = list(prompt_ids), len(prompt_ids) + max_new_tokens
    drafter = Drafter(slot, sampler, end_token_ids=end_token_ids, stats=stats, tracer=tracer, clock=clock)
    corrector = Corrector(
        slot,
        sampler,
        decoding=decoding,
        end_token_ids=end_token_ids,
        stats=stats,
        tracer=tracer,
        clock=clock,
        eps=eps,
        rule=rule,
        num_alternatives=num_alternatives,
    )
    chooser, lookup = WindowChooser(decoding), Lookup(end_token_ids)
    num_grafts = decoding.num_lookup_nodes if rule is None else 0

    logits = yield from _prefill(slot, sequence, stats, following=_after(max_new_tokens))
    first = emitted(_choose(sampler, logits, sequence, tracer), logits, num_alternatives)
    del logits
    yield _emit(first, "full", sequence, stats)
    while len(sequence) < limit and sequence[-1] not in end_token_ids:
        given = yield from next_window(chooser)
        left, room = limit - len(sequence), min(slot.room, given.num_nodes)
        tree = yield from drafter.draft(sequence, fit_window(given.window, decoding.tree_width, left=left, room=room))
        if num_grafts:
            lookup.graft(
                tree,
                sequence,
                # Grafted levels take no time to draft: they may go further down than it pays to draft.
                num_levels=min(decoding.max_window, left) - 1,
                num_nodes=min(num_grafts, room - len(tree)),
                acceptance=chooser.acceptance,
                price=chooser.node_price,
            )
        acceptance, tokens = yield from corrector.correct(tree, sequence, following=_after(left))
        stats.count_window(given.window, acceptance)
        lookup.learn(tree, acceptance)
        _teach(chooser, tree, acceptance, stats)
        for token, origin in zip(tokens, _origins(acceptance), strict=True):
            yield _emit(token, origin, sequence, stats)


def _one_by_one(
    slot: Slot,
    kind: Literal["full", "draft"],
    sampler: Sampler,
    prompt_ids: Sequence[int],
    stats: DecodeStats,
    tracer: Tracer | None,
    num_alternatives: int | None,
) -> Steps:
    """One token a step, each chosen by the sampler."""
    sequence = list(prompt_ids)
    origin: Origin = "full"
    logits = yield from _prefill(slot, sequence, stats, following=kind)
    while True:
        token = emitted(_choose(sampler, logits, sequence, tracer), logits, num_alternatives)
        del logits  # not needed any more while the next ones are computed
        yield _emit(token, origin, sequence, stats)
        ask = Ask(slot=slot, kind=kind, token_ids=sequence[-1:], following=kind)
        logits, origin = (yield from logits_of(ask))[0], kind
        stats.num_passes[kind] += 1


def _prefill(slot: Slot, prompt_ids: Sequence[int], stats: DecodeStats, *, following: Pass) -> Generator[Event, Reply, Tensor]:
    """-> logits float32 [V] behind the prompt."""
    ask = Ask(slot=slot, kind="prefill", token_ids=prompt_ids[slot.length :], following=following)
    logits = yield from logits_of(ask)
    stats.num_passes["prefill"] += 1
    return logits[0]


def _choose(sampler: Sampler, logits: Tensor, sequence: Sequence[int], tracer: Tracer | None) -> int:
    with during(tracer, "sample", "choose a token"):
        return sampler.choose(logits, len(sequence), sequence)


def _emit(token: Emitted, origin: Origin, sequence: list[int], stats: DecodeStats) -> Emitted:
    sequence.append(token.token_id)
    stats.num_tokens[origin] += 1
    return token


def _after(left: int) -> Pass:
    """What will follow a pass that gives at least one of the tokens that are left.

    A draft, if two more are: one for itself and one that the full model adds. That a window may give all but the last one, behind
    which nothing is drafted, is not foreseen.
    """
    return "draft" if left - 1 >= MIN_WINDOW else "correction"


def _origins(acceptance: Acceptance) -> Iterator[Origin]:
    num_drafted, num_verified = acceptance.num_drafted, acceptance.num_drafted + acceptance.num_looked_up
    for index in range(len(acceptance.token_ids)):
        yield "draft" if index < num_drafted else "lookup" if index < num_verified else "full"


def _teach(chooser: WindowChooser, tree: DraftTree, acceptance: Acceptance, stats: DecodeStats) -> None:
    """Tell the chooser what a window has shown."""
    num_before = len(stats.draft_seconds) - tree.num_levels
    chooser.learn(
        num_tokens=len(acceptance.token_ids),
        num_accepted=acceptance.num_accepted,
        num_tried=acceptance.num_tried,
        draft_seconds=stats.draft_seconds[num_before:],
        num_nodes=len(tree),
        correction_seconds=stats.correction_seconds[-1],
    )
