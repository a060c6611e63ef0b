"""The loops of the three modes with models that are a rule for the next token, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_sirius.config import MAX_AUTO_WINDOW, DecodingConfig, SamplingConfig
from offload_sirius.decode.accept import Acceptance
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.tree import DraftTree
from offload_sirius.trace import Tracer

from .toys import VOCAB, Rule, ToyModel, decode_full, decode_sirius, decode_sparse, forgetful, jumble, mostly, successor

GREEDY = SamplingConfig()
NO_END: frozenset[int] = frozenset()
PROMPTS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)
SAMPLING = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 3]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 2**64 - 1),
)
DECODING = st.builds(
    DecodingConfig,
    window=st.one_of(st.integers(2, 9), st.just("auto")),
    tree_width=st.integers(1, 5),
    lookup=st.sampled_from([None, True, False]),
    mode=st.just("sirius"),
)


def drafted_and_corrected(seed: int, share: float, num_seen: int) -> tuple[Rule, Rule]:
    target = forgetful(jumble(seed), num_seen)
    return target, mostly(target, jumble(seed + 1), share)


RULES = st.builds(
    drafted_and_corrected, st.integers(0, 1000), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.sampled_from([1, 2, 1000])
)
"""A target that sees only so many tokens, and a draft that gives the same logits for some share of sequences."""
ENDS = st.frozensets(st.integers(0, VOCAB - 1), max_size=3)


class WatchedSampler(Sampler):
    """Writes down what it was asked."""

    def __init__(self, config: SamplingConfig) -> None:
        super().__init__(config)
        self.asked: list[tuple[int, list[int]]] = []

    def choose(self, logits: Tensor, position: int, token_ids: Sequence[int]) -> int:
        self.asked.append((position, list(token_ids)))
        return super().choose(logits, position, token_ids)


def full_tokens(
    count: int, target: Rule, prompt: Sequence[int], config: SamplingConfig = GREEDY, ends: frozenset[int] = NO_END
) -> list[int]:
    """What full mode gives, up to an end token."""
    answer = []
    for token_id in islice(decode_full(ToyModel(target), Sampler(config), prompt, DecodeStats()), count):
        answer.append(token_id)
        if token_id in ends:
            break
    return answer


class Ticking:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


class Sirius:
    """A decoding with corrections of toy models, and what it leaves."""

    def __init__(self, target: Rule, draft: Rule | None = None, *, capacity: int = 10_000, **decoding: Any) -> None:
        self.model = ToyModel(target, draft, capacity=capacity)
        self.stats = DecodeStats()
        self._decoding = DecodingConfig(mode="sirius", **decoding)

    def tokens(
        self,
        prompt: Sequence[int],
        count: int,
        config: SamplingConfig = GREEDY,
        ends: frozenset[int] = NO_END,
        **more: Any,
    ) -> Any:
        return decode_sirius(
            self.model,
            Sampler(config),
            prompt,
            decoding=self._decoding,
            end_token_ids=ends,
            max_new_tokens=count,
            stats=self.stats,
            **{"clock": Ticking()} | more,
        )


def decoding_fields(decoding: DecodingConfig) -> dict[str, Any]:
    return {"window": decoding.window, "tree_width": decoding.tree_width, "lookup": decoding.lookup}


def test_greedy_tokens_are_the_likeliest_ones() -> None:
    assert full_tokens(5, successor, [13]) == [14, 15, 0, 1, 2]


@pytest.mark.parametrize(("decode", "kind"), [(decode_full, "full"), (decode_sparse, "draft")])
def test_the_prompt_is_computed_in_one_pass_and_each_token_in_one_more(decode: Any, kind: str) -> None:
    model, stats = ToyModel(successor), DecodeStats()
    assert list(islice(decode(model, Sampler(GREEDY), [3, 1, 4], stats), 4)) == [5, 6, 7, 8]
    assert [(call.kind, call.token_ids) for call in model.calls] == [
        ("prefill", [3, 1, 4]),
        (kind, [5]),
        (kind, [6]),
        (kind, [7]),
    ]
    assert {call.following for call in model.calls} == {kind}
    assert (stats.passes.prefill, getattr(stats.passes, kind)) == (1, 3)
    assert getattr(stats.tokens_by_origin, kind) == (4 if kind == "full" else 3)


def test_sparse_tokens_are_the_draft_models_but_for_the_first() -> None:
    model = ToyModel(successor, lambda sequence: successor((sequence[-1] + 1,)))
    assert list(islice(decode_sparse(model, Sampler(GREEDY), [0], DecodeStats()), 4)) == [1, 3, 5, 7]


@pytest.mark.parametrize("decode", [decode_full, decode_sparse])
def test_no_pass_is_begun_before_its_token_is_wanted(decode: Any) -> None:
    model = ToyModel(successor)
    tokens = decode(model, Sampler(GREEDY), [0], DecodeStats())
    for num_passes in range(4):
        assert len(model.calls) == num_passes
        next(tokens)


@given(prompt=PROMPTS, count=st.integers(1, 8))
def test_the_sampler_is_told_the_position_and_everything_before_it(prompt: list[int], count: int) -> None:
    sampler = WatchedSampler(GREEDY)
    answer = list(islice(decode_full(ToyModel(successor), sampler, prompt, DecodeStats()), count))
    sequence = prompt + answer
    assert sampler.asked == [(position, sequence[:position]) for position in range(len(prompt), len(sequence))]


@given(prompt=PROMPTS, count=st.integers(1, 8), split=st.integers(0, 8), seed=st.integers(0, 2**64 - 1))
def test_an_answer_goes_on_the_same_when_its_beginning_is_given_as_prompt(
    prompt: list[int], count: int, split: int, seed: int
) -> None:
    config = SamplingConfig(temperature=1.0, seed=seed)
    answer = full_tokens(count, jumble(0), prompt, config)
    given = answer[: min(split, count - 1)]
    assert given + full_tokens(count - len(given), jumble(0), prompt + given, config) == answer


def test_the_prompt_that_was_given_is_left_as_it_is() -> None:
    prompt = [1, 2]
    full_tokens(3, successor, prompt)
    list(Sirius(successor, window=3).tokens(prompt, 5))
    assert prompt == [1, 2]


@settings(max_examples=150, deadline=None)
@given(
    rules=RULES,
    prompt=PROMPTS,
    count=st.integers(1, 24),
    config=SAMPLING,
    decoding=DECODING,
    ends=ENDS,
    spare=st.integers(-1, 40),
)
def test_corrected_tokens_are_those_of_full_mode_whatever_the_draft_was(
    rules: tuple[Rule, Rule],
    prompt: list[int],
    count: int,
    config: SamplingConfig,
    decoding: DecodingConfig,
    ends: frozenset[int],
    spare: int,
) -> None:
    capacity = len(prompt) + count + spare
    sirius = Sirius(*rules, capacity=capacity, **decoding_fields(decoding))
    answer = list(sirius.tokens(prompt, count, config, ends))
    assert answer == full_tokens(count, rules[0], prompt, config, ends)
    assert sirius.model.kept_ids == (prompt + answer)[:-1]


@settings(max_examples=40, deadline=None)
@given(rules=RULES, prompt=PROMPTS, count=st.integers(1, 24), config=SAMPLING, decoding=DECODING, ends=ENDS)
def test_the_figures_add_up(
    rules: tuple[Rule, Rule],
    prompt: list[int],
    count: int,
    config: SamplingConfig,
    decoding: DecodingConfig,
    ends: frozenset[int],
) -> None:
    sirius = Sirius(*rules, **decoding_fields(decoding))
    answer = list(sirius.tokens(prompt, count, config, ends))
    stats, kinds = sirius.stats, sirius.model.kinds()
    assert (stats.passes.prefill, stats.passes.draft, stats.passes.correction, stats.passes.full) == (
        1,
        kinds.count("draft"),
        kinds.count("correction"),
        0,
    )
    assert len(stats.draft_seconds) == kinds.count("draft")
    assert len(stats.correction_seconds) == len(stats.windows) == kinds.count("correction")
    assert stats.num_advanced == len(answer) - 1
    assert stats.num_accepted == stats.tokens_by_origin.draft
    origins = stats.tokens_by_origin
    assert origins.draft + origins.lookup + origins.full == len(answer)
    assert decoding.lookup is not False or origins.lookup == 0
    assert stats.num_accepted <= stats.num_tried <= stats.num_accepted + len(stats.windows)


@settings(max_examples=40, deadline=None)
@given(rules=RULES, prompt=PROMPTS, count=st.integers(1, 24), decoding=DECODING, ends=ENDS, spare=st.integers(-1, 10))
def test_the_forecast_is_right_but_where_an_end_token_or_the_end_of_the_answer_cuts_in(
    rules: tuple[Rule, Rule], prompt: list[int], count: int, decoding: DecodingConfig, ends: frozenset[int], spare: int
) -> None:
    sirius = Sirius(*rules, capacity=len(prompt) + count + spare, **decoding_fields(decoding))
    answer = list(sirius.tokens(prompt, count, ends=ends))
    for call, after in pairwise(sirius.model.calls):
        if call.following == after.kind:
            continue
        assert (call.following, after.kind) == ("draft", "correction")
        drafts_ended = call.kind == "draft" and ends & set(after.token_ids)
        # All but one of the tokens that were left have been accepted: behind the last one nothing is drafted.
        one_left = call.kind == "correction" and after.token_ids == (prompt + answer)[-2:-1] and len(answer) == count
        assert drafts_ended or one_left


@settings(max_examples=40, deadline=None)
@given(rules=RULES, prompt=PROMPTS, count=st.integers(2, 24), decoding=DECODING)
def test_no_window_is_begun_before_its_first_token_is_wanted(
    rules: tuple[Rule, Rule], prompt: list[int], count: int, decoding: DecodingConfig
) -> None:
    sirius = Sirius(*rules, **decoding_fields(decoding))
    tokens = sirius.tokens(prompt, count)
    assert sirius.model.calls == []
    num_due, num_passes = 0, 0
    for num_tokens, _ in enumerate(tokens, start=1):
        if num_tokens > num_due:
            num_due, num_passes = 1 + sirius.stats.num_advanced, len(sirius.model.calls)
        assert len(sirius.model.calls) == num_passes
        assert sum(sirius.stats.num_tokens.values()) == num_tokens


def test_a_window_is_drafted_step_by_step_and_corrected_at_once() -> None:
    sirius = Sirius(successor, window=4)
    assert list(sirius.tokens([0], 9)) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert [(call.kind, call.token_ids) for call in sirius.model.calls] == [
        ("prefill", [0]),
        *[("draft", [1]), ("draft", [2]), ("draft", [3]), ("correction", [1, 2, 3, 4])],
        *[("draft", [5]), ("draft", [6]), ("draft", [7]), ("correction", [5, 6, 7, 8])],
    ]
    assert not any(call.is_tree for call in sirius.model.calls)
    assert sirius.stats.aal == 4
    assert sirius.stats.acceptance == 1
    assert sirius.stats.effective_density(0.6) == pytest.approx((3 * 0.6 + 1) / 4)


def test_the_levels_of_a_tree_are_drafted_in_one_step_each() -> None:
    sirius = Sirius(jumble(0), jumble(1), window=4, tree_width=3)
    list(sirius.tokens([0], 5))
    calls = sirius.model.calls[1:5]
    assert [(call.kind, len(call.token_ids), call.is_tree) for call in calls] == [
        ("draft", 1, False),
        ("draft", 3, True),
        ("draft", 3, True),
        ("correction", 10, True),
    ]


def test_nothing_is_drafted_past_the_end_of_the_answer() -> None:
    sirius = Sirius(successor, window=9)
    assert len(list(sirius.tokens([0], 4))) == 4
    assert sirius.model.kinds() == ["prefill", "draft", "draft", "correction"]


def test_the_last_token_is_corrected_alone() -> None:
    sirius = Sirius(successor, window=3)
    assert len(list(sirius.tokens([0], 5))) == 5
    assert sirius.model.kinds() == ["prefill", "draft", "draft", "correction", "correction"]
    assert sirius.stats.aal == 2


def test_nothing_is_drafted_behind_an_end_token() -> None:
    sirius = Sirius(successor, window=9)
    assert list(sirius.tokens([0], 20, ends=frozenset({3}))) == [1, 2, 3]
    assert sirius.model.kinds() == ["prefill", "draft", "draft", "correction"]
    assert sirius.stats.aal == 2


def test_an_end_token_that_only_the_draft_chose_ends_nothing() -> None:
    sirius = Sirius(successor, lambda sequence: successor((2,)), window=4)
    assert list(sirius.tokens([4], 4, ends=frozenset({3}))) == [5, 6, 7, 8]


def test_an_answer_may_end_with_its_first_token() -> None:
    for count, ends in ((1, NO_END), (9, frozenset({1}))):
        sirius = Sirius(successor, window=4)
        assert list(sirius.tokens([0], count, ends=ends)) == [1]
        assert sirius.model.kinds() == ["prefill"]
        assert (sirius.stats.aal, sirius.stats.acceptance, sirius.stats.effective_density(0.5)) == (None, None, None)


@pytest.mark.parametrize(
    ("room", "kinds", "nodes"),
    [
        (7, ["draft", "draft", "correction"], 7),
        (6, ["draft", "correction"], 4),
        (4, ["draft", "correction"], 4),
        # Not even one level of three: a line.
        (3, ["draft", "draft", "correction"], 3),
        (2, ["draft", "correction"], 2),
        (1, ["correction"], 1),
    ],
)
def test_a_tree_is_as_large_as_the_cache_has_room_for(room: int, kinds: list[str], nodes: int) -> None:
    sirius = Sirius(jumble(0), window=4, tree_width=3, capacity=2 + room)
    next_two = islice(sirius.tokens([5, 6], 100), 2)
    assert len(list(next_two)) == 2
    assert sirius.model.kinds() == ["prefill", *kinds]
    assert len(sirius.model.calls[-1].token_ids) == nodes


LAP = [*range(VOCAB), 0]
"""Behind it `successor` goes round again."""


def test_what_stood_in_the_prompt_need_not_be_drafted_well() -> None:
    sirius = Sirius(successor, jumble(0), window=5)
    assert list(sirius.tokens(LAP, 16)) == LAP[1:]
    assert sirius.stats.aal == 5
    assert (sirius.stats.tokens_by_origin.full, sirius.stats.tokens_by_origin.lookup) == (1 + 3, 12)
    assert sirius.stats.acceptance == 0


def test_windows_give_no_more_than_they_shall_whatever_is_looked_up() -> None:
    """W each with a fixed one; the longest there may be with a chosen one; never more than are left."""
    sirius = Sirius(successor, window=4, lookup=True)
    assert len(list(sirius.tokens(LAP, 10))) == 10
    assert (sirius.stats.num_advanced, sirius.stats.aal) == (9, 3)
    sirius = Sirius(successor, jumble(0), window="auto")
    assert len(list(sirius.tokens(LAP, 40))) == 40
    assert max(len(call.token_ids) for call in sirius.model.calls[1:]) <= MAX_AUTO_WINDOW
    assert sirius.stats.aal is not None
    assert sirius.stats.mean_window is not None
    assert sirius.stats.aal > sirius.stats.mean_window


def test_nothing_is_looked_up_under_a_threshold_unless_asked_for() -> None:
    for asked, num_found in (({}, 12), ({"accept": "threshold"}, 0), ({"accept": "threshold", "lookup": True}, 12)):
        sirius = Sirius(successor, jumble(0), window=5, **asked)
        assert list(sirius.tokens(LAP, 16)) == LAP[1:]
        assert sirius.stats.tokens_by_origin.lookup == num_found


def test_nothing_is_looked_up_where_a_rule_decides() -> None:
    def first_alone(tree: DraftTree, *_: Any) -> Acceptance:
        assert len(tree) == tree.num_drafted
        return Acceptance(token_ids=(3,), nodes=(0,), num_drafted=0, num_accepted=0, num_tried=1)

    assert list(Sirius(successor, window=3).tokens(LAP, 4, rule=first_alone)) == [1, 3, 3, 3]


def num_looked_up(row_seconds: float) -> int:
    """Rows of corrections beside the draft, where tokens hang on all before them, so that what followed some follows others
    seldom; a draft step takes a second, a correction five and so much a row."""

    def seconds_of_rows() -> float:
        calls = sirius.model.calls
        corrected = [len(call.token_ids) for call in calls if call.kind == "correction"]
        return sirius.model.kinds().count("draft") + 5 * len(corrected) + row_seconds * sum(corrected)

    sirius = Sirius(jumble(0), jumble(1), window=4)
    list(sirius.tokens(LAP, 400, clock=seconds_of_rows))
    corrections = [len(call.token_ids) for call in sirius.model.calls if call.kind == "correction"]
    return sum(corrections) - 4 * len(corrections)


def test_tokens_are_looked_up_as_long_as_they_pay() -> None:
    free, cheap, dear = (num_looked_up(row_seconds) for row_seconds in (0.0, 1.0, 5.0))
    assert free > 4 * cheap > 4 * dear > 0


def test_sampled_drafts_use_the_random_numbers_of_full_mode() -> None:
    """The same rule on both sides: every draw agrees, though each token has 16 possibilities."""
    sirius = Sirius(jumble(0), window=6)
    list(sirius.tokens([1], 40, SamplingConfig(temperature=2.0, seed=3)))
    assert sirius.stats.acceptance == 1


def test_choices_are_spans_of_the_trace() -> None:
    tracer = Tracer()
    list(Sirius(successor, window=3).tokens([0], 4, tracer=tracer))
    assert [(span.row, span.name) for span in tracer.spans()] == [
        ("sample", "choose a token"),
        ("sample", "choose drafted tokens"),
        ("sample", "choose drafted tokens"),
        ("sample", "accept drafted tokens"),
    ]


def test_close_rivals_are_counted_where_an_eps_is_given() -> None:
    def close(sequence: tuple[int, ...]) -> Tensor:
        logits = successor(sequence) * 8
        return logits + (logits.roll(1) * (1 - 2**-9) if sequence[-1] % 2 else 0)

    for eps, config, flips in (
        (None, GREEDY, None),
        (2**-8, GREEDY, 2),
        (2**-10, GREEDY, 0),
        (2**-8, SamplingConfig(temperature=1.0), None),
        (2**-8, SamplingConfig(repetition_penalty=1.0001), 2),
    ):
        sirius = Sirius(close, window=4)
        list(sirius.tokens([0], 5, config, eps=eps))
        assert sirius.stats.flips == flips


def seconds_of(model: ToyModel) -> float:
    """A draft step takes a second, a correction five."""
    return sum({"prefill": 0, "draft": 1, "correction": 5, "full": 5}[kind] for kind in model.kinds())


def test_auto_lengthens_windows_of_a_good_draft_and_shortens_those_of_a_bad_one() -> None:
    last = []
    for draft in (successor, jumble(0)):
        sirius = Sirius(successor, draft, window="auto")
        list(sirius.tokens([0], 100, clock=partial(seconds_of, sirius.model)))
        assert set(sirius.stats.draft_seconds) == {1}
        assert set(sirius.stats.correction_seconds) == {5}
        last.append(sirius.stats.last_window)
    good, bad = last
    assert good > 10 > 3 >= bad
