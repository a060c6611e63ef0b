"""The processes that share a batch: one by itself, or those that `accelerate launch` has started, by its state and splitting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Protocol, TypeVar

from offload_sirius import machine
from offload_sirius.config import EngineConfig
from offload_sirius.errors import ConfigError

PATIENCE = timedelta(days=30)
"""For which a process waits for the slowest one."""

SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where the number of processes is said."""

T = TypeVar("T")


class Processes(Protocol):
    """This one, among all that share the batch."""

    @property
    def index(self) -> int:
        """This one's number; 0 writes the output."""
        ...

    @property
    def count(self) -> int:
        """Of all of them."""
        ...

    def share(self, items: Sequence[T]) -> list[T]:
        """Those of the items that are this one's."""
        ...

    def placed(self, config: EngineConfig) -> EngineConfig:
        """This one's device, and its part of the memory and cores of a machine that several run on."""
        ...

    def wait(self) -> None:
        """Until all of them have come here."""
        ...

    def leave(self) -> None:
        """It is over."""
        ...


class Alone:
    """One process."""

    index, count = 0, 1

    def share(self, items: Sequence[T]) -> list[T]:
        """See Processes."""
        return list(items)

    def placed(self, config: EngineConfig) -> EngineConfig:
        """See Processes."""
        return config

    def wait(self) -> None:
        """See Processes."""

    def leave(self) -> None:
        """See Processes."""


class Launched:
    """One of several, by accelerate."""

    def __init__(self, config: EngineConfig) -> None:
        """Waits for all of them. Raises ConfigError without accelerate."""
        import torch

        try:
            from accelerate import PartialState
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed; pip install 'offload-sirius[multi]'") from error
        self._on_cpu = config.device == "cpu" or _launched_on_cpu() or not torch.cuda.is_available()
        self._state = PartialState(cpu=self._on_cpu, timeout=PATIENCE)

    @property
    def index(self) -> int:
        """See Processes."""
        return int(self._state.process_index)

    @property
    def count(self) -> int:
        """See Processes."""
        return int(self._state.num_processes)

    def share(self, items: Sequence[T]) -> list[T]:
        """See Processes."""
        with self._state.split_between_processes(list(items)) as share:
            return list(share)

    def placed(self, config: EngineConfig) -> EngineConfig:
        """See Processes."""
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", self.count))
        config = replace(config, host_memory=_part(config.host_memory, config.host_size.share, num_here))
        if not self._on_cpu:
            return replace(config, device=f"cuda:{self._state.local_process_index}")
        return replace(
            config,
            device="cpu",
            device_memory=_part(config.device_memory, config.device_size.share, num_here),
            threads=config.threads or max(machine.physical_cores() // num_here, 1),
        )

    def wait(self) -> None:
        """See Processes."""
        self._state.wait_for_everyone()

    def leave(self) -> None:
        """See Processes."""
        self._state.destroy_process_group()


def join(config: EngineConfig) -> Processes:
    """The processes of this run: several, where the environment that accelerate, or mpirun for it, makes says so."""
    if any(int(os.environ.get(name, "1")) > 1 for name in SIZES):
        return Launched(config)
    return Alone()


def is_left_alone() -> bool:
    """Whether accelerate was asked for several processes and has started this one only, as it does on CPUs without mpirun."""
    asked_for_several = _launched_on_cpu() and "MASTER_ADDR" in os.environ
    return asked_for_several and not any(name in os.environ for name in SIZES)


def _launched_on_cpu() -> bool:
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "yes", "1")


def _part(size: str, share: float | None, num_processes: int) -> str:
    """A share of free memory is divided among the processes of a machine; bytes are each one's."""
    return size if share is None else f"{share / num_processes:.6f}"
