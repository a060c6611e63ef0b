"""Which drafted tokens stand, and the token that the full model puts behind them: pure functions of a tree and its logits.

exact       the walk of SpecExec (arXiv 2406.02532): the full model's own token at each node, while it was drafted
threshold   the rule of Sirius (arXiv 2409.03856): what the full model finds likely enough; greedy only
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_sirius.decode.sampling import Sampler, checked_id, likeliest
from offload_sirius.decode.tree import DraftTree

THRESHOLD_TEMPERATURE = 0.6
"""By which Sirius divides the logits before it compares probabilities with the threshold."""

Choose = Callable[[int, Sequence[int]], int]
"""The full model's token behind a node, given all tokens up to and with the node's."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """What a window has become: as many emitted tokens as kept nodes, each token following the node of the same index."""

    token_ids: tuple[int, ...]
    """Emitted, at least one. The last of them has no keys and values yet."""
    nodes: tuple[int, ...]
    """Ascending: the root, and the accepted nodes that an emitted token follows."""
    num_drafted: int
    """Emitted tokens that had been drafted, counted from the first."""
    num_looked_up: int = 0
    """Emitted tokens behind those that had been grafted: with the drafted ones all that were emitted, or all but the last."""
    num_accepted: int
    """Drafted levels that stood: the drafted tokens that the window would have given if nothing had been grafted."""
    num_tried: int
    """Drafted levels that were looked at: the accepted ones, and the one that was rejected if any was."""


class AcceptanceRule(Protocol):
    """Decides what stands instead of the rules here: for measurements in which that is not left to the models."""

    def __call__(
        self, tree: DraftTree, logits: Tensor, sampler: Sampler, sequence: Sequence[int], end_token_ids: frozenset[int]
    ) -> Acceptance:
        """Arguments and errors as in accept_exact."""


def accept_exact(
    tree: DraftTree, logits: Tensor, sampler: Sampler, sequence: Sequence[int], end_token_ids: frozenset[int]
) -> Acceptance:
    """The tokens that full mode would choose, as far as the tree knows them and one further.

    Grafted branches leave a drafted path where the draft was wrong, so what the draft alone would have given is the path's
    drafted beginning.

    logits: float32 [nodes, V] of the full model. sequence: all tokens up to and with the root. Raises WeightReadError where the
    logits of a node that counts are no numbers. Waits for the device once where the likeliest tokens are taken as they are, else
    once a token.
    """
    choose = likeliest_of(logits) if sampler.is_argmax else drawn_from(logits, sampler)
    before, nodes = list(sequence), [0]
    while True:
        before.append(choose(nodes[-1], before))
        child = tree.child(nodes[-1], before[-1])
        if child is None or before[-1] in end_token_ids:
            break
        nodes.append(child)
    path = nodes if child is None else [*nodes, child]
    best_drafted = max(node for node in path if node < tree.num_drafted)
    return _acceptance(tree, before[len(sequence) :], path, best_drafted, end_token_ids)


def drawn_from(logits: Tensor, sampler: Sampler) -> Choose:
    """The sampler's choice, node by node. logits: float32 [nodes, V]."""
    return lambda node, before: sampler.choose(logits[node], len(before), before)


def likeliest_of(logits: Tensor) -> Choose:
    """What `drawn_from` gives where the sampler takes the likeliest token as it is: read for all nodes at once."""
    rows = likeliest(logits).tolist()

    def choose(node: int, before: Sequence[int]) -> int:
        largest, token_id = rows[node]
        return checked_id(largest, token_id, len(before))

    return choose


def accept_threshold(
    tree: DraftTree,
    logits: Tensor,
    sampler: Sampler,
    sequence: Sequence[int],
    end_token_ids: frozenset[int],
    threshold: float,
) -> Acceptance:
    """The longest path of tokens that the full model gives at least that probability each, and its likeliest token behind it.

    Of paths that are equally long the first in node order is taken, so a drafted one before a grafted one. An end token is
    accepted only where it is the likeliest, and it ends the window. Arguments and errors as in accept_exact. Waits for the device
    once.
    """
    judged = _judge(tree, logits, sampler, sequence)
    accepted = [0]
    for node in range(1, len(tree)):
        parent, token_id = tree.parents[node], tree.token_ids[node]
        if parent not in accepted:
            continue
        full_id = checked_id(*judged.likeliest[parent], len(sequence) + tree.depths[parent])
        if judged.probabilities[node] >= threshold and (token_id not in end_token_ids or token_id == full_id):
            accepted.append(node)
    # The first of the deepest: max keeps the first of equals.
    best = max(accepted, key=lambda node: tree.depths[node])
    best_drafted = max((node for node in accepted if node < tree.num_drafted), key=lambda node: tree.depths[node])
    path, emitted = tree.path(best), tree.drafted_ids(best)
    if not emitted or emitted[-1] not in end_token_ids:
        emitted.append(checked_id(*judged.likeliest[best], len(sequence) + len(emitted)))
    return _acceptance(tree, emitted, path, best_drafted, end_token_ids)


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    """What the full model thinks of a tree."""

    likeliest: list[tuple[float, float]]
    """For each node the largest logit behind it, and its token."""
    probabilities: list[float]
    """Of each node behind its parent, at THRESHOLD_TEMPERATURE; the root's means nothing."""


def _judge(tree: DraftTree, logits: Tensor, sampler: Sampler, sequence: Sequence[int]) -> _Judgement:
    """Reads all that the threshold needs at once. Row by row, as the probabilities of all rows would take twice their memory."""
    token_ids = torch.tensor(tree.token_ids).to(logits.device)  # [nodes]
    parents = torch.tensor([0, *tree.parents[1:]]).to(logits.device)  # [nodes]
    tops, rows = [], []
    for node, raw in enumerate(logits):
        scores = sampler.penalised(raw, [*sequence, *tree.drafted_ids(node)])  # [V]
        tops.append(likeliest(scores[None]))
        rows.append((scores.double() / THRESHOLD_TEMPERATURE).softmax(dim=0)[token_ids])  # [V] -> [nodes]
    probabilities = torch.stack(rows).gather(0, parents[None])[0]  # [nodes, nodes] -> [nodes]
    read = torch.cat((torch.cat(tops), probabilities[:, None]), dim=1).tolist()
    return _Judgement(likeliest=[(row[0], row[1]) for row in read], probabilities=[row[2] for row in read])


def _acceptance(
    tree: DraftTree, emitted: Sequence[int], path: Sequence[int], best_drafted: int, end_token_ids: frozenset[int]
) -> Acceptance:
    """path: the root and all accepted nodes. best_drafted: what its last would be if nothing had been grafted."""
    # Behind a grafted node all are grafted.
    num_drafted = sum(node < tree.num_drafted for node in path) - 1
    num_accepted = tree.depths[best_drafted]
    # How good drafts are decides how many of them are worth their time: what was grafted counts neither for them nor against.
    ended = num_accepted > 0 and tree.token_ids[best_drafted] in end_token_ids
    return Acceptance(
        token_ids=tuple(emitted),
        nodes=tuple(path[: len(emitted)]),
        num_drafted=num_drafted,
        num_looked_up=len(path) - 1 - num_drafted,
        num_accepted=num_accepted,
        num_tried=num_accepted if ended else min(num_accepted + 1, tree.num_levels),
    )


def near_ties(logits: Tensor, eps: float) -> int:
    """Rows of logits [S, V] whose two largest are closer than a dtype with that eps tells numbers of their size apart.

    Waits for the device.
    """
    if logits.shape[1] < 2:
        return 0
    largest, second = logits.topk(2, dim=1).values.unbind(dim=1)  # [S]
    return int((largest - second <= eps * largest.abs()).sum())
