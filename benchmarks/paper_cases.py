"""One way to decode, timed unit by unit: tokens, windows whose advance a script decides, or answers in which models decide."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

from offload_sirius.bench.forced import ForcedAcceptance
from offload_sirius.bench.prompts import BUILT_IN
from offload_sirius.bench.variants import forced_tokens
from offload_sirius.config import DecodingConfig, GenerationConfig
from offload_sirius.decode.accept import AcceptanceRule
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine

PROMPT = "Sixty-four letters of a prompt, which random weights do not read"
NUM_ANSWER_TOKENS = 64
"""Of an answer in which models decide."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to decode."""

    name: str
    decoding: DecodingConfig
    num_units: int
    """Tokens that are timed, one by one; windows where a script decides; answers where models do."""
    aal: Fraction | None = None
    """Tokens that windows give on average by the script. None: there are no windows, or models decide."""

    @property
    def models_decide(self) -> bool:
        """Whether windows end where the full model's tokens leave the draft's."""
        return self.decoding.mode == "sirius" and self.aal is None

    @property
    def sizes(self) -> list[int]:
        """Tokens of each unit behind the first token of the answer."""
        if self.aal is None:
            return [1] * self.num_units
        totals = [forced_tokens(self.aal, count) for count in range(self.num_units + 1)]
        return [after - before for before, after in pairwise(totals)]


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What came of a case."""

    unit_seconds: list[float]
    sizes: list[int]
    """Tokens of each unit."""
    answers: list[Generation]

    @property
    def seconds_per_token(self) -> float:
        """Over all units."""
        return sum(self.unit_seconds) / sum(self.sizes)


def measured(engine: Engine, case: Case) -> Timed:
    """Time a case; a short answer before it warms up."""
    engine.generate(PROMPT, decoding=case.decoding, max_new_tokens=3, ignore_eos=True, chat=False, reuse=False)
    if not case.models_decide:
        return answered(engine, case, PROMPT)
    prompts = BUILT_IN[: case.num_units]
    found = [answered(engine, case, prompt) for prompt in prompts]
    return Timed(
        unit_seconds=[seconds for each in found for seconds in each.unit_seconds],
        sizes=[size for each in found for size in each.sizes],
        answers=[answer for each in found for answer in each.answers],
    )


def answered(engine: Engine, case: Case, prompt: str) -> Timed:
    """One answer, unit by unit. The last window is a whole one, and its correction counts."""
    sizes = [NUM_ANSWER_TOKENS] if case.models_decide else case.sizes
    num_tokens = 1 + sum(sizes)
    rule: AcceptanceRule | None = None if case.aal is None else ForcedAcceptance(case.aal)
    generation = GenerationConfig(
        decoding=case.decoding,
        # Behind a script's last window there is room for one more, so that it drafts as many tokens as all others.
        max_new_tokens=num_tokens + (case.decoding.max_window if rule else 0),
        ignore_eos=True,
        chat=case.models_decide,
        reuse=False,
    )
    stream, moments = engine.stream(prompt, generation, rule=rule), list[float]()
    for piece in stream:
        if piece.token_id is not None:
            moments.append(piece.seconds)
        if len(moments) == num_tokens:
            break
    ends = [moments[end] for end in accumulate(sizes, initial=0)]
    return Timed(unit_seconds=[after - before for before, after in pairwise(ends)], sizes=sizes, answers=[stream.interrupt()])


def nbytes_per_token(timed: Timed) -> float:
    """Of layers, over the link, for tokens behind the first."""
    moved = [answer.link.bytes for answer in timed.answers]
    return sum(each.draft + each.correction + each.full for each in moved) / sum(timed.sizes)
