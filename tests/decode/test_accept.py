"""Acceptance: walks on trees made by hand, the fast path against the plain one, the paper's rule against one written anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.config import DecodingConfig, SamplingConfig
from offload_sirius.decode.accept import (
    Acceptance,
    Choose,
    accept_exact,
    accept_threshold,
    drawn_from,
    likeliest_of,
    near_ties,
)
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.tree import Branch, DraftTree
from offload_sirius.errors import WeightReadError

from .toys import VOCAB, Rule, ToyModel, decode_sirius, jumble, mostly
from .trees import grafted_trees

GREEDY = Sampler(SamplingConfig())
END = 9
ENDS = frozenset({END})


def tree_of(*levels: Sequence[tuple[int, int]]) -> DraftTree:
    """Levels of (parent, token id) below a root of token 0."""
    tree = DraftTree(0)
    for level in levels:
        tree.grow([Branch(parent=parent, token_id=token_id, score=0.0) for parent, token_id in level])
    return tree


def line_of(*token_ids: int) -> DraftTree:
    return tree_of(*([(depth, token_id)] for depth, token_id in enumerate(token_ids)))


def favouring(*token_ids: int) -> Tensor:
    """For each node logits that have this token likeliest."""
    return torch.nn.functional.one_hot(torch.tensor(token_ids), 10).float()


def probable(*rows: dict[int, float]) -> Tensor:
    """Logits whose softmax at 0.6 gives these probabilities, and the rest of each row evenly to the other tokens of ten."""
    table = torch.empty(len(rows), 10, dtype=torch.float64)
    for row, known in zip(table, rows, strict=True):
        row[:] = (1 - sum(known.values())) / (10 - len(known))
        row[list(known)] = torch.tensor(list(known.values()), dtype=torch.float64)
    return (table.log() * 0.6).float()


def parts(acceptance: Acceptance) -> tuple[tuple[int, ...], tuple[int, ...], int, int]:
    return acceptance.token_ids, acceptance.nodes, acceptance.num_accepted, acceptance.num_tried


BRANCHES = tree_of([(0, 1), (0, 2)], [(1, 3), (2, 3)], [(3, 4), (4, 5)])
"""Nodes 1, 3, 5 are tokens 1, 3, 4 and nodes 2, 4, 6 tokens 2, 3, 5."""


@pytest.mark.parametrize(
    ("tree", "logits", "token_ids", "nodes", "accepted", "tried"),
    [
        # A line: the first one wrong, the second, none, and a bonus behind all.
        (line_of(1, 2), favouring(5, 2, 3), (5,), (0,), 0, 1),
        (line_of(1, 2), favouring(1, 5, 3), (1, 5), (0, 1), 1, 2),
        (line_of(1, 2), favouring(1, 2, 3), (1, 2, 3), (0, 1, 2), 2, 2),
        # No draft: a plain step.
        (line_of(), favouring(7), (7,), (0,), 0, 0),
        # Branches: the walk follows the full model's choice, whichever it is.
        (BRANCHES, favouring(2, 0, 3, 0, 5, 0, 8), (2, 3, 5, 8), (0, 2, 4, 6), 3, 3),
        (BRANCHES, favouring(1, 3, 0, 5, 0, 0, 0), (1, 3, 5), (0, 1, 3), 2, 3),
        # A branch that ends above the deepest level: what follows it was tried and not found.
        (tree_of([(0, 1), (0, 2)], [(1, 3)]), favouring(2, 0, 4, 0), (2, 4), (0, 2), 1, 2),
        # An end token, drafted and not.
        (line_of(1, END), favouring(1, END, 3), (1, END), (0, 1), 2, 2),
        (line_of(1, 2), favouring(1, END, 3), (1, END), (0, 1), 1, 2),
        # Drafted only: it ends nothing.
        (line_of(1, END), favouring(1, 2, 3), (1, 2), (0, 1), 1, 2),
        # Nothing is accepted behind an end token.
        (line_of(END, 2), favouring(END, 2, 3), (END,), (0,), 1, 1),
    ],
)
def test_exact_takes_what_the_full_model_chooses(
    tree: DraftTree, logits: Tensor, token_ids: tuple[int, ...], nodes: tuple[int, ...], accepted: int, tried: int
) -> None:
    assert parts(accept_exact(tree, logits, GREEDY, [8, 0], ENDS)) == (token_ids, nodes, accepted, tried)


@pytest.mark.parametrize(
    ("tree", "logits", "token_ids", "nodes", "accepted", "tried"),
    [
        # A line: likely enough, though another is likelier; and not.
        (line_of(1, 2), probable({1: 0.2, 5: 0.7}, {2: 0.05, 6: 0.9}, {}), (1, 6), (0, 1), 1, 2),
        (line_of(1, 2), probable({1: 0.2, 5: 0.7}, {2: 0.11, 6: 0.8}, {7: 0.5}), (1, 2, 7), (0, 1, 2), 2, 2),
        # Rejected: what stands behind it does not count.
        (line_of(1, 2), probable({1: 0.05, 5: 0.9}, {2: 0.9}, {7: 0.5}), (5,), (0,), 0, 1),
        (line_of(), probable({4: 0.9}), (4,), (0,), 0, 0),
        # Two branches are likely enough: the longer one wins; of equal ones the first.
        (
            BRANCHES,
            probable({1: 0.6, 2: 0.2}, {3: 0.05, 4: 0.9}, {3: 0.3}, {4: 0.9}, {5: 0.05, 8: 0.9}, {}, {}),
            (2, 3, 8),
            (0, 2, 4),
            2,
            3,
        ),
        (
            BRANCHES,
            probable({1: 0.2, 2: 0.6}, {3: 0.3}, {3: 0.3}, {4: 0.3}, {5: 0.9}, {7: 0.9}, {8: 0.9}),
            (1, 3, 4, 7),
            (0, 1, 3, 5),
            3,
            3,
        ),
        # An end token is accepted only where it is the likeliest, and is the last then.
        (line_of(1, END), probable({1: 0.9}, {END: 0.4, 6: 0.5}, {7: 0.9}), (1, 6), (0, 1), 1, 2),
        (line_of(1, END), probable({1: 0.9}, {END: 0.5, 6: 0.4}, {7: 0.9}), (1, END), (0, 1), 2, 2),
        # The full model may end where nothing was accepted.
        (line_of(1, 2), probable({END: 0.95}, {}, {}), (END,), (0,), 0, 1),
    ],
)
def test_threshold_takes_what_the_full_model_finds_likely_enough(
    tree: DraftTree, logits: Tensor, token_ids: tuple[int, ...], nodes: tuple[int, ...], accepted: int, tried: int
) -> None:
    found = accept_threshold(tree, logits, GREEDY, [8, 0], ENDS, threshold=0.1)
    assert parts(found) == (token_ids, nodes, accepted, tried)


GRAFTED = line_of(1, 2)
"""Nodes 0, 1, 2 are tokens 0, 1, 2; grafted are 3 behind 1 and 4 behind that, 5 behind the root, 6 behind 2: nodes 3 to 6."""
for parent, token_id in ((1, 3), (3, 4), (0, 5), (2, 6)):
    GRAFTED.graft(parent, token_id)


@pytest.mark.parametrize(
    ("logits", "token_ids", "nodes", "drafted", "looked_up", "accepted", "tried"),
    [
        # The draft alone, with what was grafted behind it, and with the full model's own token where both end.
        (favouring(1, 2, 7, 0, 0, 0, 0), (1, 2, 7), (0, 1, 2), 2, 0, 2, 2),
        (favouring(1, 2, 6, 0, 0, 0, 7), (1, 2, 6, 7), (0, 1, 2, 6), 2, 1, 2, 2),
        # What was grafted where the draft was wrong, which is all that is said of the draft.
        (favouring(1, 3, 0, 4, 7, 0, 0), (1, 3, 4, 7), (0, 1, 3, 4), 1, 2, 1, 2),
        (favouring(1, 3, 0, 7, 0, 0, 0), (1, 3, 7), (0, 1, 3), 1, 1, 1, 2),
        (favouring(5, 0, 0, 0, 0, 7, 0), (5, 7), (0, 5), 0, 1, 0, 1),
        (favouring(7, 0, 0, 0, 0, 0, 0), (7,), (0,), 0, 0, 0, 1),
    ],
)
def test_tokens_that_were_grafted_count_apart(
    logits: Tensor,
    token_ids: tuple[int, ...],
    nodes: tuple[int, ...],
    drafted: int,
    looked_up: int,
    accepted: int,
    tried: int,
) -> None:
    expected = Acceptance(
        token_ids=token_ids,
        nodes=nodes,
        num_drafted=drafted,
        num_looked_up=looked_up,
        num_accepted=accepted,
        num_tried=tried,
    )
    assert accept_exact(GRAFTED, logits, GREEDY, [8, 0], ENDS) == expected
    # Where all other tokens are unlikely, a threshold takes the same.
    assert accept_threshold(GRAFTED, logits * 9, GREEDY, [8, 0], ENDS, threshold=0.5) == expected


def test_a_grafted_end_token_ends_a_window_and_no_draft() -> None:
    tree = line_of(1, 2)
    tree.graft(1, END)
    for found in (
        accept_exact(tree, favouring(1, END, 0, 0), GREEDY, [0], ENDS),
        accept_threshold(tree, favouring(1, END, 0, 0) * 9, GREEDY, [0], ENDS, threshold=0.5),
    ):
        assert (found.token_ids, found.nodes, found.num_drafted, found.num_looked_up) == ((1, END), (0, 1), 1, 1)
        assert (found.num_accepted, found.num_tried) == (1, 2)


def test_under_a_threshold_the_draft_is_judged_by_its_own_longest_path() -> None:
    """1 and 2 behind it would stand; so does a longer path, which was grafted."""
    tree = line_of(1, 2)
    last = 0
    for token_id in (5, 6, 7):
        last = tree.graft(last, token_id)
    logits = probable({1: 0.4, 5: 0.5}, {2: 0.9}, {8: 0.9}, {6: 0.9}, {7: 0.9}, {8: 0.9})
    found = accept_threshold(tree, logits, GREEDY, [0], ENDS, threshold=0.1)
    assert (found.token_ids, found.nodes, found.num_drafted, found.num_looked_up) == ((5, 6, 7, 8), (0, 3, 4, 5), 0, 3)
    assert (found.num_accepted, found.num_tried) == (2, 2)


@given(tree=grafted_trees(), seed=st.integers(0, 1000), ends=st.frozensets(st.integers(0, 3), max_size=2))
def test_what_is_said_of_the_draft_does_not_depend_on_what_was_grafted(tree: DraftTree, seed: int, ends: frozenset[int]) -> None:
    logits = torch.randn(len(tree), 10, generator=torch.Generator().manual_seed(seed))
    logits[:, :4] += 2
    alone = DraftTree(tree.token_ids[0])
    for depth in range(1, tree.num_levels + 1):
        level = [node for node in range(tree.num_drafted) if tree.depths[node] == depth]
        alone.grow([Branch(parent=tree.parents[node], token_id=tree.token_ids[node], score=0.0) for node in level])
    rules = (accept_exact, partial(accept_threshold, threshold=0.05))
    for accept in rules:
        found = accept(tree, logits, GREEDY, [tree.token_ids[0]], ends)
        expected = accept(alone, logits[: len(alone)], GREEDY, [tree.token_ids[0]], ends)
        assert (found.num_accepted, found.num_tried) == (expected.num_accepted, expected.num_tried)
        assert expected.num_looked_up == 0
        assert len(found.token_ids) >= len(expected.token_ids)
        if accept is accept_exact:
            assert found.token_ids[: len(expected.token_ids)] == expected.token_ids
            assert found.num_drafted == expected.num_drafted


def test_a_probability_at_the_threshold_is_accepted() -> None:
    logits = torch.full((2, 10), -torch.inf)
    logits[0, [1, 2]] = 3.0
    logits[1, 4] = 1.0
    assert accept_threshold(line_of(2), logits, GREEDY, [0], ENDS, threshold=0.5).token_ids == (2, 4)


def test_the_threshold_is_compared_behind_the_penalty() -> None:
    sampler = Sampler(SamplingConfig(repetition_penalty=100.0))
    logits = torch.tensor([[0.0, 4.0, 0.0], [0.0, 4.0, 2.0]])
    # Token 1 was not there before: likely. Behind it, it was: token 2 is the likeliest.
    assert accept_threshold(line_of(1), logits, sampler, [0], ENDS, threshold=0.3).token_ids == (1, 2)
    assert accept_threshold(line_of(1), logits, sampler, [1, 0], ENDS, threshold=0.4).num_accepted == 0


@given(
    logits=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.0, math.nan, math.inf, -math.inf]), min_size=4, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_the_likeliest_tokens_read_at_once_are_those_the_sampler_chooses(logits: list[list[float]]) -> None:
    rows = torch.tensor(logits)
    fast, plain = likeliest_of(rows), drawn_from(rows, GREEDY)
    for node in range(len(logits)):
        assert chosen(fast, node) == chosen(plain, node)


def chosen(choose: Choose, node: int) -> int | str:
    try:
        return choose(node, [1, 2, 3])
    except WeightReadError as error:
        return str(error)


@pytest.mark.parametrize("accept", ["exact", "threshold"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused_where_they_count(accept: str, broken: float) -> None:
    def run(node: int) -> Acceptance:
        logits = favouring(1, 3, 0, 4, 0, 7, 0) * 10
        logits[node, 0] = broken
        if accept == "exact":
            return accept_exact(BRANCHES, logits, GREEDY, [8, 0], ENDS)
        return accept_threshold(BRANCHES, logits, GREEDY, [8, 0], ENDS, threshold=0.5)

    for node, position in ((0, 2), (1, 3), (3, 4), (5, 5)):
        with pytest.raises(WeightReadError, match=f"^position {position}: the logits hold NaN or infinity"):
            run(node)
    for node in (2, 4, 6):
        assert run(node).token_ids == (1, 3, 4, 7)


@pytest.mark.parametrize(
    ("rows", "eps", "count"),
    [
        ([[8.0, 7.97, 0.0], [8.0, 7.9, 0.0], [1.0, 0.97, 0.0]], 2**-8, 1),
        ([[8.0, 8.0]], 1e-9, 1),
        ([[-8.0, -8.03, -90.0]], 2**-8, 1),
        ([[0.0, -0.001]], 2**-8, 0),
        ([[3.0]], 2**-8, 0),
        ([[3.0, -math.inf]], 2**-8, 0),
    ],
)
def test_a_tie_is_near_where_numbers_of_that_size_are_rounded_together(rows: list[list[float]], eps: float, count: int) -> None:
    assert near_ties(torch.tensor(rows), eps) == count


def penalised(logits: Tensor, before: Sequence[int], penalty: float) -> list[float]:
    scores = logits.tolist()
    for token_id in set(before):
        scores[token_id] = scores[token_id] * penalty if scores[token_id] < 0 else scores[token_id] / penalty
    return scores


def likeliest(scores: list[float]) -> int:
    return max(range(VOCAB), key=lambda token_id: scores[token_id])


def probability(scores: list[float], token_id: int) -> float:
    largest = max(scores)
    weights = [math.exp((score - largest) / 0.6) for score in scores]
    return weights[token_id] / sum(weights)


class Reference:
    """Sirius as the paper has it, on lists of tokens: no cache, no masks, every probability asked for anew."""

    def __init__(
        self, target: Rule, draft: Rule, *, window: int, width: int, threshold: float, penalty: float, ends: frozenset[int]
    ) -> None:
        self.advanced: list[int] = []
        self._target, self._draft = target, draft
        self._window, self._width, self._threshold = window, width, threshold
        self._penalty, self._ends = penalty, ends

    def answer(self, prompt: list[int], count: int) -> list[int]:
        answer = [self._next(prompt)]
        while len(answer) < count and answer[-1] not in self._ends:
            emitted = self._judge(prompt + answer, self._grow(prompt + answer, min(self._window, count - len(answer)) - 1))
            self.advanced.append(len(emitted))
            answer += emitted
        return answer

    def _scores(self, rule: Rule, before: list[int]) -> list[float]:
        return penalised(rule(tuple(before)), before, self._penalty)

    def _next(self, before: list[int]) -> int:
        return likeliest(self._scores(self._target, before))

    def _grow(self, before: list[int], num_levels: int) -> list[list[int]]:
        """All drafted paths in node order."""
        paths: list[list[int]] = []
        level: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(num_levels):
            grown = [
                (score + log_probability, parent, token_id)
                for parent, (score, path) in enumerate(level)
                if not self._ends & set(path)
                for log_probability, token_id in self._best(before + path)
            ]
            grown.sort(key=lambda each: (-each[0], each[1], each[2]))
            level = [(score, [*level[parent][1], token_id]) for score, parent, token_id in grown[: self._width]]
            paths += [path for _, path in level]
        return paths

    def _best(self, before: list[int]) -> list[tuple[float, int]]:
        # In float32 as the decoder has it: the order of close paths hangs on it.
        scores = torch.tensor(self._scores(self._draft, before))[None].log_softmax(dim=1)[0].tolist()
        if self._width == 1:
            return [(0.0, likeliest(self._scores(self._draft, before)))]
        return sorted(((score, token_id) for token_id, score in enumerate(scores)), key=lambda each: (-each[0], each[1]))[
            : self._width
        ]

    def _judge(self, before: list[int], paths: list[list[int]]) -> list[int]:
        best: list[int] = []
        for path in paths:
            if len(path) > len(best) and all(self._accepts(before + path[:i], path[i]) for i in range(len(path))):
                best = path
        return best if self._ends & set(best) else [*best, self._next(before + best)]

    def _accepts(self, before: list[int], token_id: int) -> bool:
        scores = self._scores(self._target, before)
        if token_id in self._ends and token_id != likeliest(scores):
            return False
        return probability(scores, token_id) >= self._threshold


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
    count=st.integers(1, 20),
    window=st.integers(2, 9),
    width=st.sampled_from([1, 1, 2, 3, 5]),
    threshold=st.sampled_from([0.003, 0.03, 0.1, 0.37]),
    penalty=st.sampled_from([1.0, 1.0, 1.3]),
    ends=st.frozensets(st.integers(0, VOCAB - 1), max_size=3),
)
def test_threshold_decoding_is_the_method_written_out_plainly(
    seed: int,
    share: float,
    prompt: list[int],
    count: int,
    window: int,
    width: int,
    threshold: float,
    penalty: float,
    ends: frozenset[int],
) -> None:
    target, draft = jumble(seed), mostly(jumble(seed), jumble(seed + 1), share)
    reference = Reference(target, draft, window=window, width=width, threshold=threshold, penalty=penalty, ends=ends)
    stats, model = DecodeStats(), ToyModel(target, draft)
    tokens = decode_sirius(
        model,
        Sampler(SamplingConfig(repetition_penalty=penalty)),
        prompt,
        decoding=DecodingConfig(mode="sirius", window=window, tree_width=width, accept="threshold", threshold=threshold),
        end_token_ids=ends,
        max_new_tokens=count,
        stats=stats,
    )
    answer = list(tokens)
    assert answer == reference.answer(prompt, count)
    assert model.kept_ids == (prompt + answer)[:-1]
    if reference.advanced:
        assert stats.aal == pytest.approx(sum(reference.advanced) / len(reference.advanced))
