"""What each part of the method is worth: a real model's answers with one thing changed at a time. paper.py runs it.

The base is the paper's setting, coarse drafts, windows of 16, threshold 0.1, lines, but that it keeps three quarters of the
neurons: so small a model rejects of such drafts what large ones reject of half. What is lossy is held against the full model
in two ways: at each position, is the token the full model's likeliest behind the text that was written so far; and is it the
token of mode full's own answer there.

What drafts and corrections say does not depend on where weights are, so most rows are computed without a link, and their bytes
are those of so many passes; over the link goes what depends on its time, and the base, whose bytes are counted there, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from budgets import fewest_slots_nbytes

from offload_sirius.bench.accept_all import accept_all
from offload_sirius.bench.answers import agreement
from offload_sirius.bench.decode import decode_config
from offload_sirius.bench.drafted_slot import keeping_drafted
from offload_sirius.bench.variants import FULL, DecodeBench, roomiest
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine, NoProgress, build, open_model
from offload_sirius.engine.placement import find_device
from offload_sirius.engine.planning import ELEMENT_NBYTES
from offload_sirius.weights.layout import layer_layout

LINK_GBPS = 6.0
CONTEXT = 1024
NUM_FULL_TOKENS = 8
"""Of an answer by which mode full's time is measured: each takes as long as the next."""

THRESHOLDS, WINDOWS, TREE_WIDTHS = (0.05, 0.1, 0.2, 0.5), (4, 8, 16, 32, "auto"), (1, 2, 4, 8)
BASE = DecodingConfig(keep=0.75, window=16, accept="threshold", threshold=0.1, draft="streamed", lookup=False, prior=False)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The base with one thing changed, or the base itself."""

    what: str
    value: str
    decoding: DecodingConfig = BASE
    rewrites: bool = True
    """Whether corrections leave the full model's keys and values in place of the drafts'."""
    rolls_back: bool = True
    """Whether what the full model rejects is taken back."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Answers over the link."""

    seconds_per_token: float
    """Median over the prompts."""
    nbytes_per_token: float
    link_share: float | None
    """Bytes over the link's set rate, as a share of the seconds."""
    draft_seconds: float | None
    correction_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class AblationRow:
    """What came of it, over all prompts. What it does not have is None."""

    what: str
    value: str
    is_base: bool
    aal: float | None
    acceptance: float | None
    """Share of the drafted tokens looked at that stood."""
    effective_density: float | None
    """Share of the model's parameters that a token cost, median."""
    own_agreement: float
    """Share of tokens that are the full model's likeliest behind the text so far, but for the first, which is its own."""
    full_agreement: float
    """Share of positions with the token of mode full's answer."""
    num_identical: int
    """Answers that are mode full's."""
    nbytes_per_token: float
    """Of layers, over a link."""
    bytes_ratio: float
    """Those over mode full's: the ratio of seconds where the link is all that takes time."""
    by_prompt: dict[str, list[float]]
    """aal, own_agreement, bytes_ratio of each answer."""
    on_link: Timing | None
    """None where it was computed without a link."""


def ablations() -> list[Ablation]:
    """The table. Rows that are the base are measured once."""

    def changed(what: str, value: object, **settings: Any) -> Ablation:
        return Ablation(what=what, value=str(value), decoding=replace(BASE, **settings))

    return [
        *(changed("threshold", each, threshold=each) for each in THRESHOLDS),
        changed("threshold", "exact", accept="exact"),
        *(changed("window", each, window=each) for each in WINDOWS),
        *(changed("tree width", each, tree_width=each) for each in TREE_WIDTHS),
        Ablation(what="KV rewriting", value="on"),
        Ablation(what="KV rewriting", value="off", rewrites=False),
        Ablation(what="rollback", value="on"),
        Ablation(what="rollback", value="off", rolls_back=False),
        changed("refresh", "off", draft="resident", refresh=False),
        changed("refresh", "on", draft="resident"),
    ]


def paper_ablations(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure, row by row. keep: is given what there is so far."""
    is_cuda = find_device(options.device).type == "cuda"
    link_gbps = None if is_cuda else options.ablations_link_gbps
    asked = EngineConfig(
        model=options.real_model,
        device=options.device,
        link_gbps=link_gbps,
        dtype="float32",
        keep_blocks=False,
        max_context=CONTEXT,
    )
    result: dict[str, Any] = {
        "model": options.real_model,
        "device": str(find_device(options.device)),
        "dtype": "float32",
        "link_gbps": link_gbps,
        "keep": BASE.keep,
        "num_prompts": len(options.prompts),
        "max_new_tokens": options.max_new_tokens,
        "rows": [],
    }
    with build(open_model(asked.model), replace(asked, link_gbps=None, decoding=FULL), NoProgress()) as judge:
        reference = [generated(judge, FULL, prompt, options.max_new_tokens) for prompt in options.prompts]
        measuring = _Measuring(judge, reference, options, link_gbps)
        for config, group in loads(asked, options):
            with build(open_model(config.model), config, NoProgress()) as engine:
                if config.decoding.draft == "streamed" and engine.plan.streamed_layers:
                    result["on_link"] = {"full": asdict(measuring.timing(engine, FULL)), "base": asdict(measuring.timing(engine))}
                for ablation in group:
                    row = measuring.row(engine, ablation)
                    result["rows"].append(asdict(row))
                    print(line_of(row), flush=True)
                    keep(result)
    order = [(each.what, each.value) for each in ablations()]
    result["rows"].sort(key=lambda row: order.index((row["what"], row["value"])))
    keep(result)
    return result


def loads(asked: EngineConfig, options: argparse.Namespace) -> Iterator[tuple[EngineConfig, list[Ablation]]]:
    """What does not depend on the link's time without one; what does; and resident drafts, each with the fewest slots."""
    streamed = [each for each in ablations() if each.decoding.draft == "streamed"]
    decodings = tuple(dict.fromkeys(each.decoding for each in streamed))
    unpaced = replace(asked, link_gbps=None, decoding=roomiest(decodings))
    yield unpaced, [each for each in streamed if each.decoding.window != "auto"]
    bench = DecodeBench(
        prompts=tuple(options.prompts),
        variants=decodings,
        generation=GenerationConfig(max_new_tokens=options.max_new_tokens, reuse=False),
    )
    config = decode_config(open_model(asked.model), asked, bench, all_streamed=True)
    yield replace(config, decoding=roomiest(decodings)), [each for each in streamed if each.decoding.window == "auto"]
    for each in ablations():
        if each.decoding.draft == "resident":
            resident = replace(asked, decoding=each.decoding)
            yield replace(resident, device_memory=str(fewest_slots_nbytes(resident))), [each]


class _Measuring:
    """Rows beside the full model's answers."""

    def __init__(
        self, judge: Engine, reference: Sequence[Generation], options: argparse.Namespace, link_gbps: float | None
    ) -> None:
        """judge: the full model by itself. reference: its answers."""
        self._judge = judge
        self._reference = reference
        self._options = options
        self._link_gbps = link_gbps
        self._known: dict[tuple[DecodingConfig, bool, bool], AblationRow] = {}

    def timing(self, engine: Engine, decoding: DecodingConfig = BASE) -> Timing:
        """Over the link, without resident layers; of mode full the first tokens."""
        num_tokens = self._options.max_new_tokens if decoding.drafts else NUM_FULL_TOKENS
        generated(engine, decoding, self._options.prompts[0], 4)
        return self._timing_of([generated(engine, decoding, prompt, num_tokens) for prompt in self._options.prompts])

    def row(self, engine: Engine, ablation: Ablation) -> AblationRow:
        """Measured once, whatever it is called."""
        key = (ablation.decoding, ablation.rewrites, ablation.rolls_back)
        if key not in self._known:
            self._known[key] = self._measured(engine, ablation)
        return replace(self._known[key], what=ablation.what, value=ablation.value)

    def _measured(self, engine: Engine, ablation: Ablation) -> AblationRow:
        prompts, num_tokens = self._options.prompts, self._options.max_new_tokens
        generated(engine, ablation.decoding, prompts[0], 4)
        rule = None if ablation.rolls_back else accept_all
        with nullcontext() if ablation.rewrites else keeping_drafted(engine):
            answers = [generated(engine, ablation.decoding, prompt, num_tokens, rule) for prompt in prompts]
        own = [own_agreement(self._judge, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        ids, full_ids = ([answer.token_ids for answer in each] for each in (answers, self._reference))
        full_nbytes, goes_over_link = pass_nbytes(engine, "full"), bool(engine.plan.streamed_layers)
        nbytes = [moved_nbytes(answer) if goes_over_link else passes_nbytes(engine, answer) for answer in answers]
        num_timed = [answer.new_tokens - 1 for answer in answers]
        return AblationRow(
            what=ablation.what,
            value=ablation.value,
            is_base=ablation.decoding == BASE and ablation.rewrites and ablation.rolls_back,
            aal=sum(round((answer.aal or 0) * answer.windows) for answer in answers) / sum(answer.windows for answer in answers),
            acceptance=middle([answer.acceptance for answer in answers]),
            effective_density=middle([answer.effective_density for answer in answers]),
            own_agreement=sum(own) / len(own),
            full_agreement=agreement(ids, full_ids),
            num_identical=sum(here == there for here, there in zip(ids, full_ids, strict=True)),
            nbytes_per_token=sum(nbytes) / sum(num_timed),
            bytes_ratio=sum(nbytes) / sum(num_timed) / full_nbytes,
            by_prompt={
                "aal": [answer.aal or 0.0 for answer in answers],
                "own_agreement": own,
                "bytes_ratio": [each / count / full_nbytes for each, count in zip(nbytes, num_timed, strict=True)],
            },
            on_link=self._timing_of(answers) if goes_over_link else None,
        )

    def _timing_of(self, answers: Sequence[Generation]) -> Timing:
        seconds = median(answer.decode_seconds / (answer.new_tokens - 1) for answer in answers)
        nbytes = sum(map(moved_nbytes, answers)) / sum(answer.new_tokens - 1 for answer in answers)
        return Timing(
            seconds_per_token=seconds,
            nbytes_per_token=nbytes,
            link_share=None if self._link_gbps is None else nbytes / (self._link_gbps * 1e9) / seconds,
            draft_seconds=middle([answer.draft_seconds for answer in answers]),
            correction_seconds=middle([answer.correction_seconds for answer in answers]),
        )


def pass_nbytes(engine: Engine, kind: Literal["full", "draft"]) -> int:
    """Bytes of all layers, or of what a coarse draft step takes of them."""
    spec, decoding = engine.spec, engine.config.decoding
    layout = layer_layout(spec, ELEMENT_NBYTES["float32"], decoding.num_kept(spec.ffn_width))
    nbytes = layout.nbytes if kind == "full" else layout.part_nbytes("attention") + layout.part_nbytes("kept")
    return spec.num_layers * nbytes


def passes_nbytes(engine: Engine, answer: Generation) -> int:
    """What would have gone over a link, had every layer been streamed."""
    return answer.passes.draft * pass_nbytes(engine, "draft") + answer.passes.correction * pass_nbytes(engine, "full")


def generated(engine: Engine, decoding: DecodingConfig, prompt: str, num_tokens: int, rule: Any = None) -> Generation:
    """An answer of that many tokens, past the model's end tokens."""
    generation = GenerationConfig(decoding=decoding, max_new_tokens=num_tokens, ignore_eos=True, reuse=False)
    stream = engine.stream(prompt, generation, rule=rule)
    for _ in stream:
        pass
    return stream.result


def own_agreement(judge: Engine, prompt: str, answer: Generation) -> float:
    """Share of an answer's tokens behind the first that the full model would have chosen, each behind those before it."""
    context = judge.model.encode(prompt)
    scores = judge.score([*context, answer.token_ids[0]], [answer.token_ids[1:]])[0]
    return sum(score.is_likeliest for score in scores) / len(scores)


def moved_nbytes(answer: Generation) -> int:
    """Over the link, for the tokens behind the first."""
    moved = answer.link.bytes
    return moved.draft + moved.correction + moved.full


def middle(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def line_of(row: AblationRow) -> str:
    link = "" if row.on_link is None else f"  {row.on_link.seconds_per_token:.4f} s/token over the link"
    return (
        f"{row.what:13} {row.value:6} AAL {row.aal:5.2f}  own {row.own_agreement:6.1%}  mode full's {row.full_agreement:6.1%}  "
        f"bytes x {row.bytes_ratio:.3f}{link}"
    )
