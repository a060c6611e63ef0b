"""How many tokens a second where 80, 90 or 95 % of the drafted tokens stand? The whole decode loop, acceptance by a script.

    python benchmarks/scripted.py                    # the 70B shape in 4 bits, 24 GiB of a GPU, layers in shared host buffers
    python benchmarks/scripted.py --model 'synthetic:small?dtype=F32' --device cpu --link-gbps 0.05 --device-memory 60MiB

Resident drafts and exact corrections, in windows of 16. Which tokens random weights draft means nothing, so a window gives the
tokens that it would give where each drafted token stands with that chance, (1 - a^W) / (1 - a) on average, as `bench decode
--force-aal` has it. Every pass is run and timed, acceptance and the exchange of neurons with them. The model is loaded once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from report import finish, machine_facts

from offload_sirius.bench.answers import Answer
from offload_sirius.bench.decode import answer_to
from offload_sirius.bench.variants import DecodeBench, forced_tokens
from offload_sirius.config import QUANTIZES, DecodingConfig, EngineConfig, GenerationConfig
from offload_sirius.decode.window import expected_tokens
from offload_sirius.engine import Engine, NoProgress, build, open_model
from offload_sirius.engine.windows import ACCEPTANCES
from offload_sirius.errors import USER_ERRORS

PROMPT = "Sixty-four letters of a prompt, which random weights do not read"
WINDOW = 16
NUM_WINDOWS = 6
CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """One acceptance."""

    acceptance: float
    aal: float
    """Tokens that a window gave, on average."""
    draft_seconds: float
    """Median of the draft steps."""
    correction_seconds: float
    """Median of the corrections, of which the drafts' time has already brought a part."""
    draft_nbytes: int
    """Over the link, of all draft steps."""
    correction_nbytes: float
    """Over the link, of a correction."""
    tokens_per_second: float


def main() -> int:
    """Returns the exit status."""
    options = arguments()
    try:
        with build(open_model(options.model), config_of(options), NoProgress()) as engine:
            rows = list(measured(engine))
            result = {
                "model": options.model,
                "device": str(engine.device),
                "quantize": options.quantize,
                "window": WINDOW,
                "num_hot": engine.plan.hot.num_hot if engine.plan.hot else None,
                "load_seconds": engine.load_seconds,
                "rows": [asdict(row) for row in rows],
            }
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finish("scripted", {**result, **machine_facts()}, options.out)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="synthetic:llama-3-70b", help="default %(default)s")
    parser.add_argument("--device", default="auto", help="default %(default)s")
    parser.add_argument("--device-memory", default="24GiB", help="default %(default)s")
    parser.add_argument("--quantize", default="int4", choices=QUANTIZES, help="default %(default)s")
    parser.add_argument("--keep", type=float, default=0.5, help="share of neurons that may be hot, default %(default)s")
    parser.add_argument("--link-gbps", type=float, help="emulate a link of that rate; default: the device's own")
    parser.add_argument("--shared-host-buffers", type=int, help="let all layers share so many host buffers")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/scripted-DATE.json")
    return parser.parse_args()


def config_of(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=options.model,
        device=options.device,
        device_memory=options.device_memory,
        quantize=options.quantize,
        link_gbps=options.link_gbps,
        max_context=CONTEXT,
        shared_host_buffers=options.shared_host_buffers,
        decoding=DecodingConfig(draft="resident", keep=options.keep, window=WINDOW, lookup=False, prior=False),
    )


def measured(engine: Engine) -> Iterator[Row]:
    """An answer for each acceptance; one before them warms up."""
    answer_of(engine, ACCEPTANCES[0])
    for acceptance in ACCEPTANCES:
        answer = answer_of(engine, acceptance)
        assert answer.draft_seconds is not None
        assert answer.correction_seconds is not None
        row = Row(
            acceptance=acceptance,
            aal=answer.num_advanced / answer.num_windows,
            draft_seconds=answer.draft_seconds,
            correction_seconds=answer.correction_seconds,
            draft_nbytes=answer.draft_nbytes,
            correction_nbytes=(answer.nbytes - answer.draft_nbytes) / answer.num_windows,
            tokens_per_second=answer.num_timed / answer.decode_seconds,
        )
        print(
            f"{row.acceptance:.0%} of drafted tokens stand, {row.aal:.2f} tokens a window: "
            f"draft step {row.draft_seconds * 1e3:.2f} ms, "
            f"correction {row.correction_seconds:.3f} s for {row.correction_nbytes / 1e9:.3f} GB, "
            f"{row.tokens_per_second:.2f} tokens/s",
            flush=True,
        )
        yield row


def answer_of(engine: Engine, acceptance: float) -> Answer:
    """Some windows, of which the last one is a whole one, too."""
    aal, decoding = Fraction(str(round(expected_tokens(acceptance, WINDOW), 3))), engine.config.decoding
    generation = GenerationConfig(max_new_tokens=1 + forced_tokens(aal, NUM_WINDOWS), chat=False, reuse=False)
    bench = DecodeBench(prompts=(PROMPT,), variants=(decoding,), generation=generation, forced_aal=aal)
    return answer_to(engine, PROMPT, decoding, bench)


if __name__ == "__main__":
    sys.exit(main())
