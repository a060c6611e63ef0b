"""What every benchmark says at its end: a machine, versions, a date, one JSON line, one result file."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

import offload_sirius
from offload_sirius.errors import ConfigError

RESULTS = Path(__file__).parent / "results"


def machine_facts() -> dict[str, Any]:
    """Where and with what a result was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "cpu": cpu,
            "cores": psutil.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "offload_sirius": offload_sirius.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": commit(),
        },
    }


def commit() -> str | None:
    """Of the working tree, short, with a plus where tracked files differ from it; None without git or a repository."""
    root = RESULTS.parents[1]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--exclude=*", "--dirty=+"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def parts_of(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Those of these parts that a result file has, for a run that measures others. Raises ConfigError for a damaged file."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
        return {name: found[name] for name in names if name in found}
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: is no result file ({type(error).__name__}); remove it, or give another with --out") from error


def finish(name: str, result: dict[str, Any], out: Path | None = None) -> None:
    """Print the result as one JSON line and keep it as a dated file, beside the command that gave it."""
    result = {"command": command_line(), **result}
    path = out or RESULTS / f"{name}-{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def command_line() -> str:
    """As it may be given in a clone: `python benchmarks/stream.py --passes 15`."""
    script = Path(sys.argv[0]).resolve()
    root = RESULTS.parents[1]
    name = str(script.relative_to(root)) if script.is_relative_to(root) else script.name
    return shlex.join(["python", name, *sys.argv[1:]])
