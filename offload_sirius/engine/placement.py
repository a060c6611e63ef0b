"""From settings and the machine to a plan: which device, which type, how much memory, and where each layer goes.

Reads sizes, never weights; allocates nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from offload_sirius import machine
from offload_sirius.config import EngineConfig
from offload_sirius.errors import BudgetError, ConfigError, DeviceError
from offload_sirius.model.kv_cache import kv_cache_nbytes
from offload_sirius.model.transformer import activation_nbytes, position_tables_nbytes
from offload_sirius.units import MIB, format_size
from offload_sirius.weights.disk import reader_nbytes
from offload_sirius.weights.layout import LayerLayout, layer_layout
from offload_sirius.weights.plan import MAX_READERS, Budgets, Demand, Plan, as_flag, make_plan
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.spec import ModelSpec

DEFAULT_CONTEXT = 4096
"""Positions planned for where nobody says how long prompt and answer will be."""

HOST_RESERVE_NBYTES = 192 * MIB
"""Host memory left to the program itself: libraries that load late, scratch memory of matmuls, text."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Everything that is decided before a byte is allocated."""

    device: torch.device
    dtype: torch.dtype
    context: int
    """Positions of the KV cache."""
    layout: LayerLayout
    plan: Plan


def place(checkpoint: Checkpoint, config: EngineConfig) -> Placement:
    """Decide. Raises BudgetError with the smallest budget that works, DeviceError, ConfigError."""
    spec = checkpoint.spec
    device = find_device(config.device)
    dtype = compute_dtype(config, spec)
    context = context_of(config, spec)
    layout = layer_layout(spec, dtype.itemsize)
    demand = Demand(
        kv_cache_nbytes=kv_cache_nbytes(spec, batch=1, capacity=context, element_nbytes=dtype.itemsize),
        position_tables_nbytes=position_tables_nbytes(spec, context, dtype.itemsize),
        activation_nbytes=activation_nbytes(spec, context, dtype.itemsize),
        reader_nbytes=reader_nbytes(checkpoint),
        embedding_on_device=spec.tied_head,
        staged=device.type == "cuda",
        num_shared_buffers=config.shared_host_buffers,
    )
    plan = _plan_within(spec, layout, demand, config, device)
    return Placement(device=device, dtype=dtype, context=context, layout=layout, plan=plan)


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


def compute_dtype(config: EngineConfig, spec: ModelSpec) -> torch.dtype:
    """The type weights are held and computed in. auto: float32 for what is stored so, bfloat16 for everything shorter."""
    if config.dtype == "auto":
        return torch.float32 if spec.stored_dtype == "F32" else torch.bfloat16
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]


def context_of(config: EngineConfig, spec: ModelSpec) -> int:
    """Positions to plan for. Raises ConfigError for more than the model has."""
    if config.max_context is None:
        return min(DEFAULT_CONTEXT, spec.max_positions)
    if config.max_context > spec.max_positions:
        raise ConfigError(f"--max-context is {config.max_context}; {spec.name} has {spec.max_positions} positions")
    return config.max_context


def _plan_within(spec: ModelSpec, layout: LayerLayout, demand: Demand, config: EngineConfig, device: torch.device) -> Plan:
    """Without a GPU the device's budget and the host's are parts of one memory: the host's share is of what the device leaves,
    and the device's of what the readers leave, since a disk read by too few of them costs more than a few residents save."""
    free_host = max(machine.free_host_nbytes() - HOST_RESERVE_NBYTES, 0)
    if device.type == "cuda":
        free_device = int(torch.cuda.mem_get_info(device)[0])
        budgets = Budgets(device_nbytes=config.device_size.resolve(free_device), host_nbytes=config.host_size.resolve(free_host))
        plan = make_plan(spec, layout, demand, budgets)
        _require_free(("device",), plan.device_nbytes, free_device)
        _require_free(("host",), plan.host_nbytes, free_host)
        return plan
    readers_nbytes = min(MAX_READERS * demand.reader_nbytes, free_host // 4)
    free_device = free_host - readers_nbytes
    device_nbytes = config.device_size.resolve(free_device)
    unlimited = make_plan(spec, layout, demand, Budgets(device_nbytes=device_nbytes, host_nbytes=1 << 62))
    _require_free(("device",), unlimited.device_nbytes, free_device)
    host_nbytes = config.host_size.resolve(free_host - unlimited.device_nbytes)
    plan = make_plan(spec, layout, demand, Budgets(device_nbytes=device_nbytes, host_nbytes=host_nbytes))
    _require_free(("device", "host"), plan.device_nbytes + plan.host_nbytes, free_host)
    return plan


def _require_free(places: tuple[str, ...], needed_nbytes: int, free_nbytes: int) -> None:
    if needed_nbytes > free_nbytes:
        flags = " and ".join(f"--{place}-memory" for place in places)
        together = "together " if len(places) > 1 else ""
        raise BudgetError(
            f"{' and '.join(places)} memory: the plan takes {format_size(needed_nbytes)}, {format_size(free_nbytes)} are free; "
            f"give smaller {flags}, {together}at most {as_flag(_rounded_down(free_nbytes))}"
        )


def _rounded_down(nbytes: int) -> int:
    """Less by what as_flag rounds up, which is at most a hundredth, so that what it says is not above nbytes."""
    return nbytes * 99 // 100


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
