"""A loaded model that answers. One answer at a time; nothing here is thread-safe."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field, replace
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
from offload_sirius.decode.loop import Tokens, decode_full, decode_sirius, decode_sparse
from offload_sirius.decode.result import Generation, LinkBytes, LinkFigures, MemoryFigures
from offload_sirius.decode.sampling import Sampler
from offload_sirius.decode.scoring import Scorer, TokenScore
from offload_sirius.decode.stats import DecodeStats
from offload_sirius.decode.stream import Outcome, TextStream
from offload_sirius.decode.text import Detokenizer, StopMatcher
from offload_sirius.engine.opened import Model, Prompt
from offload_sirius.engine.placement import Placement, memory_errors
from offload_sirius.engine.planning import computing_nbytes, plan_figures, prediction_figures, scored_rows_of
from offload_sirius.engine.streamed import StreamedModel
from offload_sirius.errors import ConfigError
from offload_sirius.model.transformer import Transformer
from offload_sirius.sparsity.cats import Cats, FetchCounts
from offload_sirius.sparsity.costs import draft_density
from offload_sirius.sparsity.hot import HotStatistic
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
        self._answering: _Request | None = None
        """The answer that the KV cache holds."""

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
        if self._closed:
            raise RuntimeError("the engine is closed: load the model again")
        config = with_settings(config or GenerationConfig(), settings, self.config.decoding)
        decoding = self._planned_for(config)
        prompt_ids = self.model.encode(prompt, chat=config.chat)
        request = _Request(
            prompt_ids=prompt_ids,
            config=config,
            decoding=decoding,
            max_new_tokens=self.model.room_for(len(prompt_ids), config.max_new_tokens, self._placement.context),
            end_token_ids=frozenset() if config.ignore_eos else self.model.end_token_ids,
            rule=rule,
        )
        counters = _Counters(self._streamer, self._streamed)
        return TextStream(
            tokens=self._tokens(request),
            detokenizer=Detokenizer(self.model.tokenizer),
            stops=StopMatcher(config.stop),
            end_token_ids=request.end_token_ids,
            max_new_tokens=request.max_new_tokens,
            finish=lambda outcome: self._finish(outcome, counters, request),
        )

    def score(self, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[list[TokenScore]]:
        """What the full model says of each token of each continuation behind the same context, none of them empty.

        Continuations that differ in their last token only take one pass together; each further pass computes what differs from
        the one before. Raises PromptError where one does not fit.
        """
        if self._closed:
            raise RuntimeError("the engine is closed: load the model again")
        # Raises for what is no token, and for too many: the last one is only looked at.
        self.model.encode([each[-1] for each in continuations])
        for continuation in continuations:
            computed = self.model.encode([*context, *continuation[:-1]])
            self.model.room_for(len(computed), 1, self._placement.context)
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, continuation in enumerate(continuations):
            alike.setdefault(tuple(continuation[:-1]), []).append(index)
        scores: list[list[TokenScore]] = [[] for _ in continuations]
        for beginning, indices in alike.items():
            wanted = [*([token_id] for token_id in beginning), [continuations[index][-1] for index in indices]]
            *shared, last = self._scored([*context, *beginning], wanted)
            for index, own in zip(indices, last, strict=True):
                scores[index] = [*(each for (each,) in shared), own]
        return scores

    def _scored(self, prompt_ids: list[int], wanted: list[list[int]]) -> list[list[TokenScore]]:
        """One pass. wanted: ids behind each of the prompt's last tokens."""
        torch.set_num_threads(self.config.threads or machine.physical_cores())
        decoding = replace(self.config.decoding, mode="full")
        # Logits are wanted from the last token of the context on: so much of it at least has to be computed.
        context = prompt_ids[: len(prompt_ids) - len(wanted) + 1]
        self._answering = None
        num_cached = self._streamed.begin_answer(decoding, context, reuse=True)
        num_rows = scored_rows_of(self.config, self.spec, self._placement.context, self._placement.dtype.itemsize)
        scorer = Scorer(wanted, len(context))
        try:
            with memory_errors(self.plan):
                self._streamed.score(torch.tensor(prompt_ids[num_cached:]), len(wanted), scorer.read, num_rows=num_rows)
        except Exception:
            self._streamed.forget()
            raise
        return scorer.scores

    def require_planned(self, config: GenerationConfig) -> None:
        """Raises ConfigError, as answering would, for settings that the model was not loaded for."""
        self._planned_for(config)

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

    def _tokens(self, request: _Request) -> Tokens:
        # The reader threads compute with one thread each; torch keeps that number per thread, so ours is set here.
        torch.set_num_threads(self.config.threads or machine.physical_cores())
        request.num_cached = self._streamed.begin_answer(request.decoding, request.prompt_ids, reuse=request.reuses)
        self._answering = request
        try:
            with memory_errors(self.plan), closing(self._decode(request)) as tokens:
                for token_id in tokens:
                    yield token_id
                    if self._answering is not request:
                        raise RuntimeError(
                            "another answer was begun in place of this one: end an answer before the next is begun"
                        )
                    torch.set_num_threads(self.config.threads or self._decode_threads())
        except Exception:  # not an interruption, which breaks nothing
            if self._answering is request:
                self._streamed.forget()
            raise

    def _decode(self, request: _Request) -> Tokens:
        model, sampler, decoding = self._streamed, Sampler(request.config.sampling), request.decoding
        if decoding.mode == "full":
            return decode_full(model, sampler, request.prompt_ids, request.stats, self._tracer)
        if decoding.mode == "sparse":
            return decode_sparse(model, sampler, request.prompt_ids, request.stats, self._tracer)
        dtype = self._placement.dtype
        return decode_sirius(
            model,
            sampler,
            request.prompt_ids,
            decoding=decoding,
            end_token_ids=request.end_token_ids,
            max_new_tokens=request.max_new_tokens,
            stats=request.stats,
            tracer=self._tracer,
            # In float32 the full model's choice at a near-tie is as good as any; in shorter types it may be another one.
            eps=None if dtype == torch.float32 else torch.finfo(dtype).eps,
            rule=request.rule,
        )

    def _decode_threads(self) -> int:
        """One core is left to the readers while layers come from disk: a matmul's threads wait for the one that shares its core.

        Not during the prompt, whose matmuls are worth more than the reading they slow down.
        """
        cores = machine.physical_cores()
        return max(cores - 1, 1) if self.plan.disk_layers else cores

    def _finish(self, outcome: Outcome, counters: _Counters, request: _Request) -> Generation:
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
            settings=_settings(self.config, request),
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


@dataclass(kw_only=True)
class _Request:
    """One answer while it is written."""

    prompt_ids: list[int]
    config: GenerationConfig
    decoding: DecodingConfig
    max_new_tokens: int
    end_token_ids: frozenset[int]
    rule: AcceptanceRule | None
    stats: DecodeStats = field(default_factory=DecodeStats)
    num_cached: int = 0
    """Tokens of the prompt that the KV cache held already."""

    @property
    def reuses(self) -> bool:
        """Whether what the KV cache holds of earlier answers may be used: where drafts decide, their neurons would depend on what
        was asked before, and the text on them."""
        decided = self.decoding.mode == "full" or (self.decoding.mode == "sirius" and self.decoding.accept == "exact")
        return self.config.reuse and decided and self.rule is None


def _settings(config: EngineConfig, request: _Request) -> dict[str, Any]:
    """Every setting of an answer by its name; those of decoding, as they were for this answer, also together."""
    decoding = asdict(request.decoding)
    return asdict(config) | asdict(request.config) | decoding | {"decoding": decoding}


class _Counters:
    """The streamer's and the link's counters, from where an answer began."""

    def __init__(self, streamer: Streamer, streamed: StreamedModel) -> None:
        self._streamer = streamer
        self._fetches = streamed.sparsity.counts if isinstance(streamed.sparsity, Cats) else None
        self._hot_set = streamed.sparsity if isinstance(streamed.sparsity, HotStatistic) else None
        self._num_exchanged = self._hot_set.num_exchanged if self._hot_set else 0
        self._pass_nbytes = dict(streamer.pass_nbytes)
        self._discarded_nbytes = streamer.discarded_nbytes
        self._copied_nbytes = streamer.copied_nbytes
        self._busy_seconds = streamer.busy_seconds
        self._num_needed, self._num_missing = (self._fetches.needed, self._fetches.missing) if self._fetches else (0, 0)

    def figures(self, seconds: float, loaded_nbytes: int) -> LinkFigures:
        """What has happened since. seconds: how long it took."""
        streamer = self._streamer
        by_phase = {phase: nbytes - self._pass_nbytes[phase] for phase, nbytes in streamer.pass_nbytes.items()}
        copied = streamer.copied_nbytes - self._copied_nbytes
        peak = streamer.peak_bytes_per_second
        streams = copied > 0 and seconds > 0
        return LinkFigures(
            bytes=LinkBytes(load=loaded_nbytes, discarded=streamer.discarded_nbytes - self._discarded_nbytes, **by_phase),
            copied_bytes=copied,
            gbytes_per_second=copied / seconds / 1e9 if streams else None,
            measured_peak_gbytes_per_second=peak / 1e9 if peak else None,
            busy_share=min((streamer.busy_seconds - self._busy_seconds) / seconds, 1.0) if streams else None,
            cache_hit_share=self._hit_share,
        )

    def churn(self, num_windows: int) -> float | None:
        """Share of the hot set that a window exchanged."""
        hot_set = self._hot_set
        if hot_set is None or hot_set.decay is None or num_windows == 0:
            return None
        return (hot_set.num_exchanged - self._num_exchanged) / (num_windows * hot_set.ids.shape[0] * hot_set.num_hot)

    @property
    def _hit_share(self) -> float | None:
        if self._fetches is None:
            return None
        counts = FetchCounts(needed=self._fetches.needed - self._num_needed, missing=self._fetches.missing - self._num_missing)
        return counts.hit_share


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
