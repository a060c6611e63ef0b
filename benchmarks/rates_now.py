"""The rates of this machine, measured anew for a benchmark that compares predictions with what then happens."""

from __future__ import annotations

import tempfile
from pathlib import Path

from offload_sirius.bench.rates import ROUNDS, measure_rates
from offload_sirius.cache import cache_folder
from offload_sirius.engine.placement import DTYPES, find_device, hardware_of
from offload_sirius.engine.planning import assumed_rates
from offload_sirius.rates import DtypeName, Rates


def measured_rates(dtype: DtypeName, disk: Path | None = None, *, device: str = "cpu", rounds: int = ROUNDS) -> Rates:
    """In the type that the model computes in. disk: file or folder whose disk is measured, None for one of ours.

    rounds: of which medians count.
    """
    folder, found = cache_folder(), find_device(device)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        return measure_rates(found, DTYPES[dtype], disk or Path(own), assumed_rates(hardware_of(found)), "measured now", rounds)
