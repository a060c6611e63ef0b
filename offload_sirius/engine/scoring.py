"""What the full model says of given continuations: a prompt's pass that ends in other logits than the last ones.

Continuations with the same beginning take one pass, and a pass computes what its prompt does not share with the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_sirius.decode.scoring import Scorer, TokenScore

if TYPE_CHECKING:
    from offload_sirius.engine.engine import Engine


def score(
    engine: Engine, context: Sequence[int], continuations: Sequence[Sequence[int]], *, num_rows: int
) -> list[list[TokenScore]]:
    """See Engine.score. num_rows: logits that there is room for at once."""
    # Raises for what is no token, and for too many: the last one is only looked at.
    engine.model.encode([each[-1] for each in continuations])
    for continuation in continuations:
        computed = engine.model.encode([*context, *continuation[:-1]])
        engine.model.room_for(len(computed), 1, engine.context)
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, continuation in enumerate(continuations):
        alike.setdefault(tuple(continuation[:-1]), []).append(index)
    scores: list[list[TokenScore]] = [[] for _ in continuations]
    for beginning, indices in alike.items():
        wanted = [*([token_id] for token_id in beginning), [continuations[index][-1] for index in indices]]
        *shared, last = _pass(engine, [*context, *beginning], wanted, num_rows)
        for index, own in zip(indices, last, strict=True):
            scores[index] = [*(each for (each,) in shared), own]
    return scores


def _pass(engine: Engine, prompt_ids: list[int], wanted: list[list[int]], num_rows: int) -> list[list[TokenScore]]:
    """wanted: ids behind each of the prompt's last tokens."""
    # Logits are wanted from the last token of the context on: so much of it at least has to be computed.
    context = prompt_ids[: len(prompt_ids) - len(wanted) + 1]
    scorer = Scorer(wanted, len(context))
    engine.require_no_batch("a text is scored")
    engine.use_threads(prompt=True)
    with engine.answering(scorer) as streamed:
        slot = streamed.slots[0]
        num_cached = slot.shared(context) if streamed.reuses else 0
        slot.begin(num_cached)
        streamed.prepare(replace(engine.config.decoding, mode="full"))
        streamed.score(prompt_ids[num_cached:], len(wanted), scorer.read, num_rows=num_rows)
    return scorer.scores
