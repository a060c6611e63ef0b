"""Windows without rollback: all that was drafted stands, whatever the full model says of it. For measurements of what rollback is
worth; the correction still makes keys and values the full model's, and says what follows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from offload_sirius.decode.accept import Acceptance
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.tree import DraftTree


def accept_all(
    tree: DraftTree, logits: Tensor, sampler: Sampler, sequence: Sequence[int], end_token_ids: frozenset[int]
) -> Acceptance:
    """An AcceptanceRule: the whole draft and the full model's token behind it, or none where the draft has ended the text.

    Trees must be lines. Arguments and errors as in accept_exact.
    """
    assert tree.is_line
    drafted = tree.token_ids[1:]
    emitted = list(drafted)
    if not drafted or drafted[-1] not in end_token_ids:
        before = [*sequence, *drafted]
        emitted.append(sampler.choose(logits[-1], len(before), before))
    return Acceptance(
        token_ids=tuple(emitted),
        nodes=tuple(range(len(emitted))),
        num_drafted=len(drafted),
        num_accepted=len(drafted),
        num_tried=len(drafted),
    )
