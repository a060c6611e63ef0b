"""An environment of its own for each system that is compared with: made once, kept in the cache folder. Knows no model."""

from __future__ import annotations

import subprocess
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"

REQUIREMENTS = {
    "accelerate": ("torch", "transformers", "accelerate", "safetensors"),
    "airllm": ("torch", "airllm"),
    "llama_cpp": ("llama-cpp-python",),
}
"""Environment -> what is installed there, in the project's own versions where constraints.txt has one."""


class NotInstalledError(Exception):
    """An environment could not be made; says why in one line."""


def interpreter(name: str, folder: Path) -> Path:
    """The Python of an environment, made where it is not there. Raises NotInstalledError.

    pip is asked for what `make test` asks it for: PIP_EXTRA_INDEX_URL may name the builds of torch for CPUs.
    """
    home = folder / name
    python, complete = home / "bin" / "python", home / "complete"
    if not complete.exists():
        print(f"making an environment for {name}: {', '.join(REQUIREMENTS[name])}", flush=True)
        try:
            venv.create(home, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise NotInstalledError(f"python -m venv {home} does not work: {error}") from error
        command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *REQUIREMENTS[name]]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise NotInstalledError(f"pip could not install it: {(lines or ['it said nothing'])[-1][:200]}")
        complete.touch()
    return python
