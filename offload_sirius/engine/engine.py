"""A loaded model that answers. One answer at a time; nothing here is thread-safe."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from offload_sirius import machine
from offload_sirius.config import (
    DecodingConfig,
    EngineConfig,
    GenerationConfig,
    SamplingConfig,
    names_of,
    require_greedy_threshold,
)
from offload_sirius.decode.accept import AcceptanceRule
from offload_sirius.decode.loop import Tokens, alone, decode_full, decode_sirius, decode_sparse
from offload_sirius.decode.result import Generation, MemoryFigures
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.scoring import TokenScore
from offload_sirius.decode.steps import Steps
from offload_sirius.decode.stream import Outcome, TextStream, Writer
from offload_sirius.decode.text import Detokenizer, StopMatcher
from offload_sirius.engine.batch import Batch
from offload_sirius.engine.kv_slot import KVSlot
from offload_sirius.engine.opened import Model, Prompt
from offload_sirius.engine.placement import Placement, memory_errors
from offload_sirius.engine.planning import computing_nbytes, plan_figures, prediction_figures, scored_rows_of
from offload_sirius.engine.request import Counters, Request, settings_of
from offload_sirius.engine.scoring import score
from offload_sirius.engine.streamed import StreamedModel
from offload_sirius.errors import ConfigError
from offload_sirius.model.transformer import Transformer
from offload_sirius.sparsity.costs import draft_density
from offload_sirius.trace import Tracer
from offload_sirius.weights.pinning import PinReport
from offload_sirius.weights.plan import Plan
from offload_sirius.weights.predict import Prediction
from offload_sirius.weights.streamer import Streamer
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.spec import ModelSpec


class Engine:
    """A model with its weights in place. `generate` gives a whole answer, `stream` one as it is written; `close` when done."""

    def __init__(
        self,
        *,
        model: Model,
        checkpoint: Checkpoint,
        config: EngineConfig,
        placement: Placement,
        transformer: Transformer,
        streamed: StreamedModel,
        streamer: Streamer,
        closing: ExitStack,
        device_nbytes: int,
        pinned: PinReport,
        loaded_nbytes: int,
        load_seconds: float,
        tracer: Tracer | None = None,
    ) -> None:
        """Made by `build`.

        checkpoint: what the weights are read from; device_nbytes: all device buffers; pinned: host memory of
        layers; closing: gives back all that was opened;
        tracer: as the streamer has it.
        """
        self.model = model
        self.checkpoint = checkpoint
        self.config = config
        self.load_seconds = load_seconds
        self._placement = placement
        self._transformer = transformer
        self._streamed = streamed
        self._streamer = streamer
        # Also when nobody calls close: threads that copy while the interpreter ends would take the process down with them.
        self._closing = weakref.finalize(self, closing.close)
        self._device_nbytes = device_nbytes
        self._pinned = pinned
        self._loaded_nbytes = loaded_nbytes
        self._tracer = tracer
        self._closed = False
        self._answering: object = None
        """The request or batch that was begun last."""

    @property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return self.model.spec

    @property
    def device(self) -> torch.device:
        """What computes."""
        return self._placement.device

    @property
    def plan(self) -> Plan:
        """What is resident and what is streamed."""
        return self._placement.plan

    @property
    def context(self) -> int:
        """Positions that there are for prompt and answer together."""
        return self._placement.context

    @property
    def streamer(self) -> Streamer:
        """Where the weights come from; its counters are those of the link."""
        return self._streamer

    @property
    def rates_problem(self) -> str:
        """One line where the rates measured on this machine could not be read; predictions then rest on assumed ones."""
        return self._placement.rates_problem

    def predict(self, prompt_tokens: int) -> Prediction:
        """What may be expected for a prompt of that many tokens and an answer that fills the context."""
        return self._placement.predict(prompt_tokens)

    def generate(self, prompt: Prompt, config: GenerationConfig | None = None, **settings: Any) -> Generation:
        """A whole answer. prompt: text, messages, or token ids; settings: fields of GenerationConfig, DecodingConfig and
        SamplingConfig."""
        stream = self.stream(prompt, config, **settings)
        for _ in stream:
            pass
        return stream.result

    def stream(
        self, prompt: Prompt, config: GenerationConfig | None = None, *, rule: AcceptanceRule | None = None, **settings: Any
    ) -> TextStream:
        """An answer piece by piece; its `result` has the figures at the end. One answer at a time.

        rule: for measurements; decides in mode sirius what stands of a draft, whatever the models say.
        """
        request = self.request(prompt, config or GenerationConfig(), settings, rule)
        counters = self.counters()
        return TextStream(
            tokens=self._tokens(request),
            writer=self.writer(request),
            finish=lambda outcome: self.result_of(outcome, counters, request),
        )

    def batch(self) -> Batch:
        """Answers that are written together, as many as `parallel` says. No stream may be begun while any is active."""
        return Batch(self)

    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[list[TokenScore]]:
        """What the full model says of each token of each continuation behind the same context, none of them empty.

        Continuations that differ in their last token only take one pass together; each further pass computes what differs from
        the one before. Raises PromptError where one does not fit.
        """
        if self._closed:
            raise RuntimeError("the engine is closed: load the model again")
        num_rows = scored_rows_of(self.config, self.spec, self.context, self._placement.dtype.itemsize)
        return score(self, context, continuations, num_rows=num_rows)

    def require_planned(self, config: GenerationConfig) -> None:
        """Raises ConfigError, as answering would, for settings that the model was not loaded for."""
        self._planned_for(config)

    def request(
        self, prompt: Prompt, config: GenerationConfig, settings: dict[str, Any], rule: AcceptanceRule | None = None
    ) -> Request:
        """What is asked for. Raises ConfigError and PromptError for what the model was not loaded for."""
        if self._closed:
            raise RuntimeError("the engine is closed: load the model again")
        config = with_settings(config, settings, self.config.decoding)
        decoding = self._planned_for(config)
        prompt_ids = self.model.encode(prompt, chat=config.chat)
        return Request(
            prompt_ids=prompt_ids,
            config=config,
            decoding=decoding,
            max_new_tokens=self.model.room_for(len(prompt_ids), config.max_new_tokens, self._placement.context),
            end_token_ids=frozenset() if config.ignore_eos else self.model.end_token_ids,
            rule=rule,
        )

    def counters(self) -> Counters:
        """Of the link, as they are now."""
        return Counters(self._streamer, self._streamed)

    def writer(self, request: Request) -> Writer:
        """Turns the answer's tokens into text."""
        return Writer(
            detokenizer=Detokenizer(self.model.tokenizer),
            stops=StopMatcher(request.config.stop),
            end_token_ids=request.end_token_ids,
            max_new_tokens=request.max_new_tokens,
        )

    def steps(self, request: Request, slot: KVSlot) -> Steps:
        """The passes and tokens of an answer, of whose prompt the slot may hold a beginning."""
        sampler, decoding = Sampler(request.config.sampling), request.decoding
        prompt_ids, stats, num_alternatives = request.prompt_ids, request.stats, request.config.logprobs
        if decoding.mode == "full":
            return decode_full(slot, sampler, prompt_ids, stats, self._tracer, num_alternatives)
        if decoding.mode == "sparse":
            return decode_sparse(slot, sampler, prompt_ids, stats, self._tracer)
        dtype = self._placement.dtype
        return decode_sirius(
            slot,
            sampler,
            prompt_ids,
            decoding=decoding,
            end_token_ids=request.end_token_ids,
            max_new_tokens=request.max_new_tokens,
            stats=stats,
            tracer=self._tracer,
            # In float32 the full model's choice at a near-tie is as good as any; in shorter types it may be another one.
            eps=None if dtype == torch.float32 else torch.finfo(dtype).eps,
            rule=request.rule,
            num_alternatives=num_alternatives,
        )

    @contextmanager
    def answering(self, owner: object) -> Iterator[StreamedModel]:
        """The model, for whoever answers from now on. Memory that runs out becomes a BudgetError; after an error nothing that was
        computed is reused."""
        self._answering = owner
        try:
            with memory_errors(self.plan):
                yield self._streamed
        except Exception:  # not an interruption, which breaks nothing
            if self._answering is owner:
                self._streamed.forget()
            raise

    def require_no_batch(self, what: str, *, num_own: int = 0) -> None:
        """Raises RuntimeError where answers of a batch have places: what comes would have passes of its own between theirs.

        num_own: places that belong to whoever asks.
        """
        if sum(slot.is_busy for slot in self._streamed.slots) > num_own:
            raise RuntimeError(f"answers of a batch are being written: end them before {what}")

    def use_threads(self, *, prompt: bool) -> None:
        """Compute with as many threads as pay: torch keeps the number per thread, so whoever computes says so.

        One core is left to the readers while layers come from disk: a matmul's threads wait for the one that shares its core.
        Not during the prompt, whose matmuls are worth more than the reading they slow down.
        """
        cores = self._placement.planned.hardware.num_cores
        default = max(cores - 1, 1) if self.plan.disk_layers and not prompt else cores
        wanted = self.config.threads or default
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    def close(self) -> None:
        """End threads, give memory back."""
        self._closed = True
        self._closing()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _planned_for(self, config: GenerationConfig) -> DecodingConfig:
        """How to decode: as asked for, where memory was planned for it. Raises ConfigError."""
        planned, asked = self.config.decoding, config.decoding or self.config.decoding
        require_greedy_threshold(asked, config.sampling)
        if asked.mode == "sparse" and config.logprobs is not None:
            raise ConfigError("logprobs are the full model's, and mode sparse does not ask it; use mode full or sirius")
        if asked.drafts:
            if not planned.drafts:
                raise ConfigError(
                    f"the model was loaded with mode full and is asked for mode {asked.mode}; load it with that mode"
                )
            for name in (
                "sparsity",
                "keep",
                "cats_threshold",
                "draft",
                "draft_quantize",
                "resident_first",
                "refresh",
                "refresh_decay",
                "overlap",
            ):
                found, needed = getattr(asked, name), getattr(planned, name)
                if found != needed:
                    raise ConfigError(f"the model was loaded with {name} {needed} and is asked for {found}; load it with that")
            if asked.prior and not planned.with_prior:
                raise ConfigError("the model was loaded without a prior and is asked for one; load it with prior")
            if asked.max_drafted_nodes > planned.max_drafted_nodes:
                raise ConfigError(
                    f"the model was loaded for corrections of {planned.max_drafted_nodes} tokens and is asked for "
                    f"{asked.max_drafted_nodes}; load it with mode sirius and that window and tree_width"
                )
            if asked.max_nodes > planned.max_nodes:
                if asked.lookup:
                    raise ConfigError(
                        f"the model was loaded for corrections of {planned.max_nodes} tokens and is asked for {asked.max_nodes} "
                        "with lookup; load it with lookup"
                    )
                return replace(asked, lookup=False)
        return asked

    def _tokens(self, request: Request) -> Tokens:
        self.require_no_batch("another one is begun")
        self.use_threads(prompt=True)
        with self.answering(request) as streamed:
            slot = streamed.slots[0]
            request.num_cached = slot.shared(request.prompt_ids) if request.reuses and streamed.reuses else 0
            slot.begin(request.num_cached)
            streamed.prepare(request.decoding)
            with closing(alone(streamed, self.steps(request, slot))) as tokens:
                for token in tokens:
                    yield token
                    if self._answering is not request:
                        raise RuntimeError(
                            "another answer was begun in place of this one: end an answer before the next is begun"
                        )
                    self.use_threads(prompt=False)

    def result_of(self, outcome: Outcome, counters: Counters, request: Request) -> Generation:
        """The figures of an answer that has ended. counters: from where it began."""
        assert outcome.finish_reason is not None
        self._streamed.end_answer()
        last = outcome.last_token_at or outcome.began
        first = outcome.first_token_at or last
        stats, num_prompt = request.stats, len(request.prompt_ids)
        return Generation(
            model=self.spec.name,
            mode=request.decoding.mode,
            text=outcome.text,
            token_ids=tuple(outcome.token_ids),
            finish_reason=outcome.finish_reason,
            prompt_tokens=num_prompt,
            cached_tokens=request.num_cached,
            ttft_seconds=first - outcome.began,
            decode_seconds=last - first,
            load_seconds=self.load_seconds,
            passes=stats.passes,
            link=counters.figures(last - outcome.began, self._loaded_nbytes),
            memory=self._memory(num_prompt),
            plan=self._plan_figures(num_prompt, request.decoding),
            settings=settings_of(self.config, request),
            aal=stats.aal,
            acceptance=stats.acceptance,
            effective_density=stats.effective_density(
                draft_density(self.spec, request.decoding, self.plan.hot.num_hot if self.plan.hot else None)
            ),
            window=stats.last_window,
            churn=counters.churn(len(stats.windows)),
            flips=stats.flips,
            windows=len(stats.windows),
            tokens_by_origin=stats.tokens_by_origin,
            draft_seconds=stats.median_draft_seconds,
            correction_seconds=stats.median_correction_seconds,
        )

    def _plan_figures(self, num_prompt: int, decoding: DecodingConfig) -> dict[str, Any]:
        predicted = prediction_figures(self._placement.predict(num_prompt, decoding))
        return plan_figures(self._placement.planned) | {"predicted": predicted}

    def _memory(self, num_prompt: int) -> MemoryFigures:
        device = self._placement.device
        if device.type == "cuda":
            peak_nbytes = torch.cuda.max_memory_allocated(device)
        else:
            itemsize = self._placement.dtype.itemsize
            peak_nbytes = self._device_nbytes + computing_nbytes(
                self.config, self.spec, num_prompt, itemsize, unpacks=self._placement.planned.unpacks
            )
        return MemoryFigures(
            device_plan_bytes=self.plan.device_nbytes,
            device_peak_bytes=peak_nbytes,
            host_plan_bytes=self.plan.host_nbytes,
            host_peak_bytes=machine.peak_resident_nbytes(),
            pinned_bytes=self._pinned.pinned_nbytes,
            pageable_bytes=self._pinned.pageable_nbytes,
        )


def with_settings(config: GenerationConfig, settings: dict[str, Any], planned: DecodingConfig) -> GenerationConfig:
    """Replace fields of a request, those of its decoding and sampling included. planned: decoding where nothing is said of it.

    Raises ConfigError for a name that does not exist.
    """
    own, decoding, sampling = (names_of(each) for each in (GenerationConfig, DecodingConfig, SamplingConfig))
    if unknown := sorted(set(settings) - own - decoding - sampling):
        known = sorted((own | decoding | sampling) - {"decoding", "sampling"})
        raise ConfigError(f"unknown setting {unknown[0]}; known are " + ", ".join(known))
    if isinstance(settings.get("stop"), str):
        settings = settings | {"stop": (settings["stop"],)}
    given = {name: value for name, value in settings.items() if name in own}
    if found := {name: value for name, value in settings.items() if name in decoding}:
        given["decoding"] = replace(given.get("decoding") or config.decoding or planned, **found)
    if drawn := {name: value for name, value in settings.items() if name in sampling}:
        given["sampling"] = replace(given.get("sampling") or config.sampling, **drawn)
    return replace(config, **given)
