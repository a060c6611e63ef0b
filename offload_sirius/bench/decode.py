"""The same prompts, decoded in several ways: what each costs beside the full model, and what it gives.

The full model is always among them, with the same budgets of memory and the plan that is best for it. Those that differ in which
neurons they keep are loads of their own; those that differ in windows, trees and acceptance share one, which has room for the
largest tree of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from offload_sirius.bench.answers import Answer, DecodeRow, Loaded, answer_of, row_of
from offload_sirius.bench.forced import ForcedAcceptance
from offload_sirius.bench.stream import without_residents
from offload_sirius.bench.variants import FULL, DecodeBench, name_of, roomiest
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine import Engine, Model, NoProgress, Progress, build, open_model
from offload_sirius.engine.placement import place
from offload_sirius.errors import PromptError
from offload_sirius.sparsity.costs import draft_density
from offload_sirius.trace import Tracer
from offload_sirius.weights.plan import MIN_SLOTS

NUM_WARMUP_TOKENS = 4
"""Of an answer behind each load that does not count: a first pass of each kind touches memory that later ones find."""


@dataclass(frozen=True, kw_only=True)
class DecodeReport:
    """Everything `bench decode` measures."""

    model: str
    device: str
    dtype: str
    device_budget_nbytes: int
    host_budget_nbytes: int
    link_gbps: float | None
    """As set; None where the link is a real one."""
    pass_nbytes: int
    """Bytes of layers over the link in a step of the full model."""
    num_prompts: int
    prompt_tokens: tuple[int, ...]
    max_new_tokens: int
    forced_aal: float | None
    rows: tuple[DecodeRow, ...]
    """The full model's first."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Watch(Protocol):
    """Told how far it is."""

    def loaded(self, engine: Engine) -> None:
        """An engine is ready."""

    def answered(self, name: str, num_answers: int, num_all: int) -> None:
        """An answer of the row of that name is there, so many of all."""

    def measured(self, variant: DecodingConfig, answers: Sequence[Answer]) -> None:
        """All answers of a variant are there."""


class NoWatch:
    """For those who do not want to know."""

    def loaded(self, engine: Engine) -> None:
        """See Watch."""

    def answered(self, name: str, num_answers: int, num_all: int) -> None:
        """See Watch."""

    def measured(self, variant: DecodingConfig, answers: Sequence[Answer]) -> None:
        """See Watch."""


def decode_config(model: Model, config: EngineConfig, bench: DecodeBench, *, all_streamed: bool) -> EngineConfig:
    """The settings for all loads: budgets in bytes, and a context in which all answers fit.

    all_streamed: the device has room for what every load needs and for slots, not for resident layers.
    Raises PromptError for prompts that are too long, BudgetError.
    """
    config = replace(config, max_context=_context(model, bench), decoding=FULL)
    if all_streamed:
        config = replace(config, device_memory=str(_streaming_nbytes(model, config, bench)))
    budgets = place(model.checkpoint, config).planned.budgets
    return replace(config, device_memory=str(budgets.device_nbytes), host_memory=str(budgets.host_nbytes))


def measure_decode(
    config: EngineConfig,
    bench: DecodeBench,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
    tracer: Tracer | None = None,
    known: Mapping[DecodingConfig, Sequence[Answer]] | None = None,
) -> DecodeReport:
    """Load, answer and compare. config: as decode_config makes it.

    known: answers of variants that have been measured before under the same settings, and are not again.
    """
    runner = _Runner(config, bench, progress or NoProgress(), watch or NoWatch(), tracer, dict(known or {}))
    rows = [row for variants in bench.loads for row in runner.rows(variants)]
    model = open_model(config.model)
    placement = place(model.checkpoint, config)
    return DecodeReport(
        model=placement.planned.spec.name,
        device=str(placement.device),
        dtype=placement.planned.dtype,
        device_budget_nbytes=placement.planned.budgets.device_nbytes,
        host_budget_nbytes=placement.planned.budgets.host_nbytes,
        link_gbps=config.link_gbps,
        pass_nbytes=placement.plan.pass_nbytes,
        num_prompts=len(bench.prompts),
        prompt_tokens=tuple(_prompt_tokens(model, bench)),
        max_new_tokens=bench.num_tokens,
        forced_aal=None if bench.forced_aal is None else float(bench.forced_aal),
        rows=tuple(rows),
    )


class _Runner:
    """Variants, measured load by load."""

    def __init__(
        self,
        config: EngineConfig,
        bench: DecodeBench,
        progress: Progress,
        watch: Watch,
        tracer: Tracer | None,
        known: dict[DecodingConfig, Sequence[Answer]],
    ) -> None:
        self._config = config
        self._bench = bench
        self._progress = progress
        self._watch = watch
        self._tracer = tracer
        self._answers = known
        variants = [variant for load in bench.loads for variant in load]
        self._num_all = len(bench.prompts) * len([variant for variant in variants if variant not in known])
        self._num_answers = 0

    def rows(self, variants: tuple[DecodingConfig, ...]) -> list[DecodeRow]:
        """Of variants that one load answers."""
        # A closed engine has closed its checkpoint: each load opens the model anew.
        model, config = open_model(self._config.model), replace(self._config, decoding=roomiest(variants))
        if unknown := [variant for variant in variants if variant not in self._answers]:
            with build(model, config, self._progress, self._tracer) as engine:
                self._watch.loaded(engine)
                _warm_up(engine, self._bench)
                for variant in unknown:
                    self._answers[variant] = [self._answer(engine, variant, prompt) for prompt in self._bench.prompts]
                    self._watch.measured(variant, self._answers[variant])
        plan, rate = place(model.checkpoint, config).plan, config.link_gbps
        loaded = Loaded(
            num_streamed_layers=len(plan.streamed_layers),
            num_resident_layers=len(plan.resident_layers),
            draft_density=draft_density(model.spec, variants[0], plan.hot.num_hot if plan.hot else None),
            link_bytes_per_second=None if rate is None else rate * 1e9,
        )
        return [row_of(variant, self._answers[variant], self._answers[FULL], loaded, self._name(variant)) for variant in variants]

    def _answer(self, engine: Engine, variant: DecodingConfig, prompt: str) -> Answer:
        answer = answer_to(engine, prompt, variant, self._bench)
        self._num_answers += 1
        self._watch.answered(self._name(variant), self._num_answers, self._num_all)
        return answer

    def _name(self, variant: DecodingConfig) -> str:
        return name_of(variant, self._bench.forced_aal)


def answer_to(engine: Engine, prompt: str, variant: DecodingConfig, bench: DecodeBench) -> Answer:
    """Have one prompt answered in one way."""
    generation = replace(bench.generation, decoding=variant, max_new_tokens=bench.num_tokens)
    rule = None
    if bench.forced_aal is not None:
        # Room for one more window, so that the last one that counts drafts as many tokens as all others.
        num_more = variant.max_window if variant.mode == "sirius" else 0
        generation = replace(generation, ignore_eos=True, max_new_tokens=bench.num_tokens + num_more)
        rule = ForcedAcceptance(bench.forced_aal)
    stream, moments = engine.stream(prompt, generation, rule=rule), list[float]()
    for piece in stream:
        if piece.token_id is not None:  # not the rest of the text that may come behind the last token
            moments.append(piece.seconds)
        if piece.new_tokens == bench.num_tokens:
            break
    return answer_of(stream.interrupt(), moments)


def _warm_up(engine: Engine, bench: DecodeBench) -> None:
    num_tokens = min(NUM_WARMUP_TOKENS, bench.num_tokens)
    engine.generate(bench.prompts[0], replace(bench.generation, decoding=None, max_new_tokens=num_tokens))


def _context(model: Model, bench: DecodeBench) -> int:
    limit = model.spec.max_positions
    # Trees get narrower where there is no room for them; a forced window has to be a whole one.
    needed = bench.num_tokens + (bench.num_ahead if bench.forced_aal is not None else 0)
    num_tokens = _prompt_tokens(model, bench)
    for number, found in enumerate(num_tokens, 1):
        if found + needed > limit:
            raise PromptError(
                f"prompt {number} has {found} tokens and its answer takes {needed} positions, {model.spec.name} has {limit}; "
                "leave that prompt out, or give a smaller --max-new-tokens"
            )
    return min(max(num_tokens) + bench.num_tokens + bench.num_ahead, limit)


def _prompt_tokens(model: Model, bench: DecodeBench) -> list[int]:
    """Of each prompt. Raises PromptError, saying which."""
    return [_num_tokens(model, prompt, number, bench) for number, prompt in enumerate(bench.prompts, 1)]


def _num_tokens(model: Model, prompt: str, number: int, bench: DecodeBench) -> int:
    try:
        return len(model.encode(prompt, chat=bench.generation.chat))
    except PromptError as error:
        raise PromptError(f"prompt {number}: {error}") from error


def _streaming_nbytes(model: Model, config: EngineConfig, bench: DecodeBench) -> int:
    """The most slots at which the full model has no resident layer, and no less than the other loads need."""
    budgets = [int(without_residents(model, config).device_memory)]
    for variants in bench.loads[1:]:
        decoding = roomiest(variants)
        # What would need more than that is not to be predicted from all there is.
        if decoding.draft == "auto" and decoding.draft_format is None:
            decoding = decoding.drafting_from("streamed")
        plan = place(model.checkpoint, replace(config, decoding=decoding)).plan
        variable = sum(plan.device_bill.get(what, 0) for what in ("resident_layers", "slots", "neuron_cache"))
        budgets.append(plan.device_nbytes - variable + MIN_SLOTS * plan.layer_nbytes)
    return max(budgets)
