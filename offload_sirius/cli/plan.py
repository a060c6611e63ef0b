"""`offload-sirius plan`: what goes where and how fast it will be, before anything is loaded, for machines one has and others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offload_sirius.cli import flags, settings
from offload_sirius.cli.flag_group import with_flag_groups
from offload_sirius.config import EngineConfig, PlanConfig
from offload_sirius.units import GIB

if TYPE_CHECKING:
    from offload_sirius.engine.planning import Candidate, Planned
    from offload_sirius.rates import Rates
    from offload_sirius.weights.predict import Prediction
    from offload_sirius_loaders.shape import Shape

EXAMPLES = """\b
Examples:
  offload-sirius plan --model llama-3-8b --device-memory 6GiB --keep 0.6
  offload-sirius plan --model llama-3-70b --device-memory 24GiB --host-memory 160GiB --link-gbps 25 --device-gbps 1008
  offload-sirius plan --model llama-3-70b --mode full --device-memory 24GiB --host-memory 64GiB --link-gbps 25
"""

MORE_NBYTES = 4 * GIB
"""What the plan is made with once more, to say what buying it would bring."""

ENGINE = settings.ENGINE.without(
    "cats_threshold", "accept", "threshold", "refresh", "refresh_decay", "overlap", "threads", "shared_host_buffers"
)
"""What a prediction depends on."""


@with_flag_groups
def plan(
    *,
    config: Annotated[EngineConfig, ENGINE],
    asked: Annotated[PlanConfig, settings.PLAN],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of tables.", rich_help_panel=flags.OUTPUT)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the traceback of an error.", rich_help_panel=flags.OUTPUT)
    ] = False,
) -> None:
    """Say what goes where and how fast a model will be, without loading it: on this machine, or on one that the flags describe.

    How many drafted tokens will stand nobody knows beforehand: modes with drafts are predicted for a few acceptances.

    Rates of a device (--device-tflops, --device-gbps) describe one with memory of its own; so do a size in bytes for
    --device-memory and a --link-gbps where this machine has less. --link-gbps is then its link's real rate.
    """
    report = _report(config, asked)
    if as_json:
        typer.echo(json.dumps(report.as_json()))
    else:
        # It knows this module's report.
        from offload_sirius.cli.plan_tables import print_report

        print_report(report)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything there is to say."""

    shape: Shape
    asked: PlanConfig
    candidates: Sequence[Candidate]
    """The first is the plan."""
    rates: Rates
    more_device: Prediction
    more_host: Prediction
    full: Prediction | None
    """Of mode full, with a plan of its own; None where that is what was asked for."""

    @property
    def planned(self) -> Planned:
        """The plan."""
        return self.candidates[0].planned

    @property
    def prediction(self) -> Prediction:
        """What may be expected of it."""
        return self.candidates[0].prediction

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        from dataclasses import asdict

        from offload_sirius.engine.planning import plan_figures, prediction_figures
        from offload_sirius.rates import NAMES

        draft, windows = self.prediction.draft, self.prediction.windows
        return {
            "model": self.planned.spec.name,
            "shape": self.shape.found or None,
            "parallel": self.planned.batch,
            "prompt_tokens": self.asked.prompt_tokens,
            "plan": plan_figures(self.planned) | {"predicted": prediction_figures(self.prediction)},
            "token_bill": asdict(self.prediction.token),
            "draft_bill": asdict(draft.bill) if draft else None,
            "correction_bill": asdict(windows[0].correction.bill) if windows else None,
            "prompt_bill": asdict(self.prediction.prompt),
            "rates": {name: {"value": getattr(self.rates, name), "source": self.rates.sources[name]} for name in NAMES},
            "quantized_rates": {kind: asdict(self.rates.of_quantized(kind)) for kind in self.planned.quantized_kinds},
            "with_4_gib_more": {
                "device": prediction_figures(self.more_device),
                "host": prediction_figures(self.more_host),
            },
            "mode_full": None if self.full is None else prediction_figures(self.full),
            "candidates": [
                {
                    "dtype": each.planned.dtype,
                    "draft": each.planned.config.decoding.draft,
                    "draft_quantize": each.planned.config.decoding.draft_quantize,
                    "predicted": prediction_figures(each.prediction),
                }
                for each in self.candidates
            ],
        }


def _report(config: EngineConfig, asked: PlanConfig) -> Report:
    # Imported here: they take a quarter of a second that `--help` shall not.
    from offload_sirius.cache import cache_folder
    from offload_sirius.cli.console import say
    from offload_sirius.engine.planning import (
        Candidate,
        as_packed,
        candidates,
        hardware_asked_for,
        plan_model,
        rates_asked_for,
        require_prompt,
    )
    from offload_sirius.rates import rates_file, read_rates
    from offload_sirius_loaders.shape import open_shape

    stored = read_rates(rates_file(cache_folder()))
    if stored.problem:
        say(stored.problem)
    shape = open_shape(config.model)
    config = as_packed(config, shape.checkpoint)
    require_prompt(config, shape.checkpoint.spec, asked.prompt_tokens)
    hardware = hardware_asked_for(config, asked, stored)

    def consider(config: EngineConfig) -> Candidate:
        planned = plan_model(shape.checkpoint, config, hardware, computed=shape.computed)
        rates = rates_asked_for(hardware, planned.dtype, stored, config, asked)
        return Candidate(planned=planned, prediction=planned.predict(rates, asked.prompt_tokens))

    found = candidates(config, shape.checkpoint.spec, consider)
    planned, decoding = found[0].planned, config.decoding
    full = replace(planned.config, decoding=replace(decoding, mode="full"))
    rates = rates_asked_for(hardware, planned.dtype, stored, config, asked)
    return Report(
        shape=shape,
        asked=asked,
        candidates=found,
        rates=rates,
        more_device=planned.with_more(device_nbytes=MORE_NBYTES).predict(rates, asked.prompt_tokens),
        more_host=planned.with_more(host_nbytes=MORE_NBYTES).predict(rates, asked.prompt_tokens),
        full=consider(full).prediction if decoding.drafts else None,
    )
