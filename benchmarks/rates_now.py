"""The rates of this machine, measured anew for a benchmark that compares predictions with what then happens."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from offload_sirius.bench.rates import measure_rates
from offload_sirius.cache import cache_folder
from offload_sirius.engine.placement import DTYPES
from offload_sirius.engine.planning import assumed_rates, host_hardware
from offload_sirius.rates import DtypeName, Rates


def measured_rates(dtype: DtypeName, disk: Path | None = None) -> Rates:
    """In the type that the model computes in. disk: file or folder whose disk is measured, None for one of ours."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        return measure_rates(
            torch.device("cpu"), DTYPES[dtype], disk or Path(own), assumed_rates(host_hardware()), "measured now"
        )
