"""What can go wrong that is not our fault. Each message is one line: what, what was found, what was needed, the remedy.

The command line prints `USER_ERRORS` as they are and exits with 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

from offload_sirius_loaders.errors import CheckpointError

__all__ = [
    "USER_ERRORS",
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "DeviceError",
    "OffloadSiriusError",
    "PromptError",
    "WeightReadError",
]


class OffloadSiriusError(Exception):
    """Base of all errors that a user or a file can cause."""


class ConfigError(OffloadSiriusError):
    """A setting outside its range, or two that exclude each other."""


class PromptError(OffloadSiriusError):
    """A prompt that cannot be used: empty, too long, not UTF-8."""


class BudgetError(OffloadSiriusError):
    """A memory budget too small for any plan, or memory that ran out; says the smallest budget that works."""


class DeviceError(OffloadSiriusError):
    """A device that does not exist or cannot be used."""


class WeightReadError(OffloadSiriusError):
    """Weights that could not be read in the middle of a run."""


USER_ERRORS = (OffloadSiriusError, CheckpointError)
