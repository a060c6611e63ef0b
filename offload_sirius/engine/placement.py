"""The part of planning that needs torch: which device there is, what it has free, and what running out of memory looks like.

Reads sizes, never weights; allocates nothing.
"""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from offload_sirius import machine
from offload_sirius.cache import cache_folder
from offload_sirius.config import DecodingConfig, EngineConfig
from offload_sirius.engine.planning import (
    Candidate,
    Hardware,
    Planned,
    as_packed,
    candidates,
    free_host_nbytes,
    host_hardware,
    plan_model,
    rates_of,
)
from offload_sirius.errors import BudgetError, DeviceError
from offload_sirius.rates import DtypeName, Rates, rates_file, read_rates
from offload_sirius.units import format_size
from offload_sirius.weights.layout import LayerLayout
from offload_sirius.weights.plan import HeadFormat, Plan
from offload_sirius.weights.predict import Prediction
from offload_sirius_loaders.checkpoint import Checkpoint

DTYPES: dict[DtypeName, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What was decided, on a device of torch's."""

    planned: Planned
    device: torch.device
    rates: Rates
    """What the prediction is made with."""
    rates_problem: str
    """One line where the rates measured before could not be read."""

    @property
    def dtype(self) -> torch.dtype:
        """The type weights are held and computed in."""
        return DTYPES[self.planned.dtype]

    @property
    def context(self) -> int:
        """Positions of the KV cache."""
        return self.planned.context

    @property
    def layout(self) -> LayerLayout:
        """Where everything lies in a layer."""
        return self.planned.layout

    @property
    def head_format(self) -> HeadFormat:
        """How the head is held; None: as plain numbers."""
        return self.planned.demand.head_format

    @property
    def plan(self) -> Plan:
        """Where each layer lives."""
        return self.planned.plan

    def predict(self, prompt_tokens: int, decoding: DecodingConfig | None = None) -> Prediction:
        """See Planned.predict."""
        return self.planned.predict(self.rates, prompt_tokens, decoding)


def place(checkpoint: Checkpoint, config: EngineConfig) -> Placement:
    """Decide. Raises BudgetError with the smallest budget that works, DeviceError, ConfigError."""
    config = as_packed(config, checkpoint)
    device = find_device(config.device)
    hardware = hardware_of(device)
    stored = read_rates(rates_file(cache_folder()))

    def consider(config: EngineConfig) -> Candidate:
        planned = plan_model(checkpoint, config, hardware)
        return Candidate(planned=planned, prediction=planned.predict(rates_of(hardware, planned.dtype, stored), planned.context))

    planned = candidates(config, checkpoint.spec, consider)[0].planned
    rates = rates_of(hardware, planned.dtype, stored)
    return Placement(planned=planned, device=device, rates=rates, rates_problem=stored.problem)


def hardware_of(device: torch.device) -> Hardware:
    """What a device of torch's has, and the host beside it."""
    if device.type != "cuda":
        return host_hardware()
    return Hardware(
        device=str(device),
        model=f"{torch.cuda.get_device_name(device)} on {machine.cpu_model()}",
        own_memory=True,
        free_device_nbytes=int(torch.cuda.mem_get_info(device)[0]),
        free_host_nbytes=free_host_nbytes(),
        num_cores=machine.physical_cores(),
    )


def find_device(name: str) -> torch.device:
    """auto is the first GPU, where there is one. Raises DeviceError for one that is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    kind, _, index_text = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"--device {name}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    index, num_devices = int(index_text or 0), torch.cuda.device_count()
    if index >= num_devices:
        raise DeviceError(f"--device {name}: the last CUDA device is cuda:{num_devices - 1}; use one up to it")
    return torch.device("cuda", index)


def is_of_device_memory(error: BudgetError) -> bool:
    """Whether what ran out is the memory of a device that has its own: with a smaller plan there may be enough."""
    return isinstance(error.__cause__, torch.OutOfMemoryError)


def release_device_memory(device: torch.device) -> None:
    """Give back what torch keeps of a device for later, so that the next plan has it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def memory_errors(plan: Plan) -> Iterator[None]:
    """Memory that runs out in spite of the plan ends in one line: the operating system's and torch's errors become ours."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if not _says_memory_ran_out(error):
            raise
        raise BudgetError(
            f"memory ran out; the plan takes {format_size(plan.device_nbytes)} on the device and "
            f"{format_size(plan.host_nbytes)} on the host: give smaller --device-memory or --host-memory"
        ) from error


def _says_memory_ran_out(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's CPU allocator and the threading module say it in words only.
    in_words = "allocate memory" in str(error) or "new thread" in str(error)
    return in_words or isinstance(error, MemoryError | torch.OutOfMemoryError)
