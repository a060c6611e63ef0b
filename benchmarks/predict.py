"""Does the planner know beforehand how long a token takes? Predicted against measured, over the emulated link on a CPU.

    python benchmarks/predict.py             # three shapes, three device budgets, two link rates: some ten minutes
    python benchmarks/predict.py --shape 0   # one of the shapes

The ceiling is the measurement itself. Rates are measured anew for each shape and budget, before anything of it is known: the
speed of a shared machine changes within minutes, and a prediction knows no more than its rates do. Budgets are shares of the
layers that stay on the device, so that some rows are bound by the link and others by computing. A token is one of the real decode
loop; medians of several. Bytes of the plan must equal those of the counters exactly. A row whose own tokens differ by more than
1.4 times shows a machine that did something else meanwhile: it is measured again, twice at most, and the table says so.

Then draft steps, corrections and windows of both in mode sirius, with coarse and fine sparsity, by the medians of a few answers.
A correction is predicted by what it adds to its window. What a cache of neurons will hold nobody knows beforehand, so that bytes
of fine drafts may differ where there is one.
Exit status: 0 every row within 15 %, 1 some row is not, or its bytes differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from itertools import pairwise, product
from pathlib import Path

from rates_now import measured_rates
from report import finish, machine_facts

import offload_sirius
from offload_sirius.config import SPARSITIES, DecodingConfig, EngineConfig, Sparsity
from offload_sirius.decode.result import Generation
from offload_sirius.engine import Engine
from offload_sirius.engine.planning import Planned, dtype_of, host_hardware, plan_model
from offload_sirius.rates import NAMES, Rates
from offload_sirius.weights.predict import Bound
from offload_sirius_loaders import open_checkpoint

WITHIN, BEYOND = 0, 1
TOLERANCE = 0.15

SHAPES = ("synthetic:tinyllama-1.1b", "synthetic:llama-3.2-1b?layers=8", "synthetic:llama-2-7b?layers=6&vocab=8192")
"""Many small layers; a large head; few wide layers."""

RESIDENT_SHARES = (0.0, 0.5, 0.8)
"""Of the layers that do not have to be slots."""

LINKS_GBPS = (1.0, 6.0)

DRAFT_LINK_GBPS, DRAFT_SHARE, DRAFT_WINDOW, NUM_ANSWERS, NUM_NEW = 1.0, 0.5, 4, 2, 6
"""Drafts are for slow links. Answers are short, as every token may take a window."""

STEADY = 1.4
MOST_ATTEMPTS = 3
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
CONTEXT = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run, and what was said of it beforehand."""

    model: str
    link_gbps: float
    num_resident: int
    num_streamed: int
    bound: str
    predicted_seconds: float
    seconds: float
    all_seconds: list[float]
    plan_nbytes: int
    """Of as many passes as were counted."""
    counted_nbytes: int
    rates: dict[str, float]
    num_disturbed: int = 0
    """Measurements before this one that were given up."""
    what: str = "full"
    """The pass: full, or a draft, correction or window of both with its sparsity."""
    bytes_known: bool = True
    """Whether the plan can know the bytes."""

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted_seconds / self.seconds - 1


def main() -> int:
    options = arguments()
    shapes = SHAPES if options.shape is None else SHAPES[options.shape : options.shape + 1]
    rows: list[Row] = []
    for model, share in product(shapes, RESIDENT_SHARES):
        rates = rates_for(model, options.disk)
        for link_gbps in LINKS_GBPS:
            rows.append(steady_row(model, share, link_gbps, rates, options))
            show(rows[-1])
    for model, sparsity in product(shapes, SPARSITIES):
        for each in steady_draft_rows(model, sparsity, options):
            rows.append(each)
            show(each)
    worst = max(rows, key=lambda each: abs(each.error))
    exact = all(each.plan_nbytes == each.counted_nbytes for each in rows if each.bytes_known)
    print(f"worst {worst.error:+.1%}; bytes of plan and counters are {'equal' if exact else 'NOT EQUAL'}")
    result = {
        "rows": [vars(each) | {"error": each.error} for each in rows],
        "worst_error": worst.error,
        "bytes_equal": exact,
        **machine_facts(),
    }
    finish("predict", result, options.out)
    return WITHIN if exact and abs(worst.error) <= TOLERANCE else BEYOND


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, choices=range(len(SHAPES)), help="only this one of the shapes")
    parser.add_argument("--passes", type=int, default=9, help="tokens that count, default %(default)s")
    parser.add_argument("--disk", type=Path, help="file or folder whose disk is measured, default a temporary one")
    parser.add_argument("--out", type=Path, help="result file, default benchmarks/results/predict-DATE.json")
    return parser.parse_args()


def rates_for(model: str, disk: Path | None) -> Rates:
    """Rates of this machine, now, in the type that the model computes in."""
    return measured_rates(dtype_of(EngineConfig(), open_checkpoint(model).spec), disk)


def steady_row(model: str, share: float, link_gbps: float, rates: Rates, options: argparse.Namespace) -> Row:
    """The first of a few measurements during which the machine did nothing else, or the last."""
    for num_disturbed in range(MOST_ATTEMPTS):
        found = replace(row(model, share, link_gbps, rates, options.passes), num_disturbed=num_disturbed)
        if max(found.all_seconds) <= STEADY * min(found.all_seconds):
            break
        rates = rates_for(model, options.disk)
    return found


def row(model: str, share: float, link_gbps: float, rates: Rates, num_passes: int) -> Row:
    """Predict, then run."""
    full = DecodingConfig(mode="full")
    config = EngineConfig(model=model, device="cpu", link_gbps=link_gbps, max_context=CONTEXT, decoding=full)
    planned = with_residents(config, share)
    predicted = planned.predict(rates, len(PROMPT))
    with offload_sirius.load(**vars(planned.config)) as engine:
        assert engine.plan == planned.plan
        seconds, counted_nbytes = token_seconds(engine, num_passes)
    return Row(
        model=model,
        link_gbps=link_gbps,
        num_resident=len(planned.plan.resident_layers),
        num_streamed=len(planned.plan.streamed_layers),
        bound=predicted.bound,
        predicted_seconds=predicted.seconds_per_token,
        seconds=statistics.median(seconds),
        all_seconds=seconds,
        plan_nbytes=(num_passes + 1) * planned.plan.pass_nbytes,
        counted_nbytes=counted_nbytes,
        rates={name: getattr(rates, name) for name in NAMES},
    )


def steady_draft_rows(model: str, sparsity: Sparsity, options: argparse.Namespace) -> list[Row]:
    """As steady_row, of the passes of a window."""
    for num_disturbed in range(MOST_ATTEMPTS):
        rates = rates_for(model, options.disk)
        found = [replace(each, num_disturbed=num_disturbed) for each in draft_rows(model, sparsity, rates)]
        if all(max(each.all_seconds) <= STEADY * min(each.all_seconds) for each in found):
            break
    return found


def draft_rows(model: str, sparsity: Sparsity, rates: Rates) -> list[Row]:
    """Predict, then run: a draft step, a correction, and a window of them."""
    decoding = DecodingConfig(sparsity=sparsity, window=DRAFT_WINDOW)
    config = EngineConfig(model=model, device="cpu", link_gbps=DRAFT_LINK_GBPS, max_context=CONTEXT, decoding=decoding)
    planned = with_residents(config, DRAFT_SHARE)
    predicted = planned.predict(rates, len(PROMPT))
    assert predicted.draft is not None
    with offload_sirius.load(**vars(planned.config)) as engine:
        assert engine.plan == planned.plan
        answers = [engine.generate(PROMPT, max_new_tokens=NUM_NEW, ignore_eos=True, reuse=False) for _ in range(1 + NUM_ANSWERS)][
            1:
        ]

    draft, correction = predicted.draft, predicted.windows[0].correction
    known = planned.plan.num_cached_neurons == 0

    def row_of(what: str, bound: Bound, num_drafts: int, num_corrections: int) -> Row:
        """So many of both passes, as one."""
        seconds = [num_drafts * seconds_of(each)[0] + num_corrections * seconds_of(each)[1] for each in answers]
        count = [(bool(num_drafts), "draft", draft), (bool(num_corrections), "correction", correction)]
        return Row(
            model=model,
            link_gbps=DRAFT_LINK_GBPS,
            num_resident=len(planned.plan.resident_layers),
            num_streamed=len(planned.plan.streamed_layers),
            bound=bound,
            predicted_seconds=num_drafts * draft.seconds + num_corrections * correction.seconds,
            seconds=statistics.median(seconds),
            all_seconds=seconds,
            plan_nbytes=sum(used * getattr(each.passes, kind) * time.nbytes for used, kind, time in count for each in answers),
            counted_nbytes=sum(used * getattr(each.link.bytes, kind) for used, kind, _ in count for each in answers),
            rates={name: getattr(rates, name) for name in NAMES},
            what=f"{sparsity} {what}",
            bytes_known=known or num_drafts == 0,
        )

    return [
        row_of("draft", draft.bill.bound, 1, 0),
        row_of("correction", correction.bill.bound, 0, 1),
        row_of("window", predicted.bound, DRAFT_WINDOW - 1, 1),
    ]


def seconds_of(answer: Generation) -> tuple[float, float]:
    """Of a draft step and of a correction."""
    assert answer.draft_seconds is not None
    assert answer.correction_seconds is not None
    return answer.draft_seconds, answer.correction_seconds


def with_residents(config: EngineConfig, share: float) -> Planned:
    """A plan whose device budget has room for two slots and that share of the other layers."""
    checkpoint, hardware = open_checkpoint(config.model), host_hardware()
    whole = plan_model(checkpoint, config, hardware).plan
    assert not whole.streamed_layers, "this machine has no room for the whole model"
    num_layers = len(whole.resident_layers)
    num_room = 2 + int(share * (num_layers - 2))
    fixed = whole.device_nbytes - whole.device_bill["resident_layers"]
    budget = vars(config) | {"device_memory": str(fixed + num_room * whole.layer_nbytes)}
    return plan_model(checkpoint, EngineConfig(**budget), hardware)


def token_seconds(engine: Engine, num_passes: int) -> tuple[list[float], int]:
    """Seconds between tokens, the first step left out as warm-up; streamed bytes of all steps by the counters."""
    stream = engine.stream(PROMPT, max_new_tokens=num_passes + 2, ignore_eos=True)
    moments = [piece.seconds for piece in stream if piece.token_id is not None]
    return [after - before for before, after in pairwise(moments[1:])], stream.result.link.bytes.full


def show(row: Row) -> None:
    print(
        f"{row.model:44} {row.what:18} {row.link_gbps:4g} GB/s  {row.num_resident:2} resident {row.num_streamed:2} streamed  "
        f"{row.bound:8} predicted {row.predicted_seconds:.3f} s  measured {row.seconds:.3f} s "
        f"({min(row.all_seconds):.3f} to {max(row.all_seconds):.3f})  {row.error:+6.1%}  "
        f"bytes {'equal' if row.plan_nbytes == row.counted_nbytes else 'DIFFER'}"
        + (f"  measured again {row.num_disturbed} times" if row.num_disturbed else ""),
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
