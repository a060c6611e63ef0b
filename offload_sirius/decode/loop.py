"""The way of a token in each of the three modes. Knows the model only as logits, and text only through ids.

    full     prefill, choose, emit, step
    sparse   the same with sparse steps
    sirius   prefill, choose, emit; then windows: draft, look up, correct, emit

The KV cache may hold a beginning of the prompt: of that nothing is computed again. All are lazy: a token is yielded before the
pass that would follow it is begun, so that nothing is computed for a token nobody wants.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from offload_sirius.config import MIN_WINDOW, DecodingConfig
from offload_sirius.decode.accept import Acceptance, AcceptanceRule
from offload_sirius.decode.correct import Corrector
from offload_sirius.decode.draft import Drafter
from offload_sirius.decode.lookup import Lookup
from offload_sirius.decode.model import Model, Pass
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats, Origin
from offload_sirius.decode.tree import DraftTree
from offload_sirius.decode.window import WindowChooser, fit_window
from offload_sirius.trace import Tracer, during

Tokens = Generator[int, None, None]


def decode_full(
    model: Model, sampler: Sampler, prompt_ids: Sequence[int], stats: DecodeStats, tracer: Tracer | None = None
) -> Tokens:
    """The tokens that follow the prompt, by the full model, one pass each, without end: the caller stops."""
    return _one_by_one(model, partial(model.full, following="full"), "full", sampler, prompt_ids, stats, tracer)


def decode_sparse(
    model: Model, sampler: Sampler, prompt_ids: Sequence[int], stats: DecodeStats, tracer: Tracer | None = None
) -> Tokens:
    """The same by sparse steps, which nobody corrects; only the first token is the full model's, which computes the prompt."""
    return _one_by_one(model, partial(model.draft, following="draft"), "draft", sampler, prompt_ids, stats, tracer)


def decode_sirius(
    model: Model,
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
) -> Tokens:
    """The tokens that follow the prompt, drafted by the sparse model and corrected by the full one, a window at once.

    Ends by itself: with max_new_tokens, or with an end token, which is yielded. Only corrected tokens are. The KV cache needs
    room for the prompt and all new tokens but the last; trees are made smaller where it has no more.
    clock: seconds; times passes for the choice of the window. eps: of the compute dtype, to count near ties by; None does not.
    rule: decides what stands of a draft, instead of the one that the settings name; nothing is looked up then.
    Raises WeightReadError where logits are no numbers.
    """
    sequence, limit = list(prompt_ids), len(prompt_ids) + max_new_tokens
    drafter = Drafter(model, sampler, end_token_ids=end_token_ids, stats=stats, tracer=tracer, clock=clock)
    corrector = Corrector(
        model,
        sampler,
        decoding=decoding,
        end_token_ids=end_token_ids,
        stats=stats,
        tracer=tracer,
        clock=clock,
        eps=eps,
        rule=rule,
    )
    chooser, lookup = WindowChooser(decoding), Lookup(end_token_ids)
    num_grafts = decoding.num_lookup_nodes if rule is None else 0

    logits = _prefill(model, sequence, stats, following=_after(max_new_tokens))
    yield _emit(_choose(sampler, logits, sequence, tracer), "full", sequence, stats)
    while len(sequence) < limit and sequence[-1] not in end_token_ids:
        window, left, room = chooser.choose(), limit - len(sequence), model.room
        tree = drafter.draft(sequence, fit_window(window, decoding.tree_width, left=left, room=room))
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
        acceptance = corrector.correct(tree, sequence, following=_after(left))
        stats.count_window(window, acceptance)
        lookup.learn(tree, acceptance)
        _teach(chooser, tree, acceptance, stats)
        for token_id, origin in _with_origins(acceptance):
            yield _emit(token_id, origin, sequence, stats)


def _one_by_one(
    model: Model,
    step: Callable[[Tensor], Tensor],
    kind: Literal["full", "draft"],
    sampler: Sampler,
    prompt_ids: Sequence[int],
    stats: DecodeStats,
    tracer: Tracer | None,
) -> Tokens:
    """One token a step, each chosen by the sampler. step: int64 [1] -> logits float32 [1, V]."""
    sequence = list(prompt_ids)
    origin: Origin = "full"
    logits = _prefill(model, sequence, stats, following=kind)
    while True:
        yield _emit(_choose(sampler, logits, sequence, tracer), origin, sequence, stats)
        logits, origin = step(torch.tensor(sequence[-1:]))[0], kind
        stats.num_passes[kind] += 1


def _prefill(model: Model, prompt_ids: Sequence[int], stats: DecodeStats, *, following: Pass) -> Tensor:
    logits = model.prefill(torch.tensor(prompt_ids[model.length :]), following=following)
    stats.num_passes["prefill"] += 1
    return logits


def _choose(sampler: Sampler, logits: Tensor, sequence: Sequence[int], tracer: Tracer | None) -> int:
    with during(tracer, "sample", "choose a token"):
        return sampler.choose(logits, len(sequence), sequence)


def _emit(token_id: int, origin: Origin, sequence: list[int], stats: DecodeStats) -> int:
    sequence.append(token_id)
    stats.num_tokens[origin] += 1
    return token_id


def _after(left: int) -> Pass:
    """What will follow a pass that gives at least one of the tokens that are left.

    A draft, if two more are: one for itself and one that the full model adds. That a window may give all but the last one, behind
    which nothing is drafted, is not foreseen.
    """
    return "draft" if left - 1 >= MIN_WINDOW else "correction"


def _with_origins(acceptance: Acceptance) -> Iterator[tuple[int, Origin]]:
    num_drafted, num_verified = acceptance.num_drafted, acceptance.num_drafted + acceptance.num_looked_up
    for index, token_id in enumerate(acceptance.token_ids):
        yield token_id, "draft" if index < num_drafted else "lookup" if index < num_verified else "full"


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
