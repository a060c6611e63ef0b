"""Prompts that answers are measured on: a few of our own, or those of a file. Knows no model."""

from __future__ import annotations

import json
from pathlib import Path

from offload_sirius.errors import PromptError

BUILT_IN = (
    "Explain in a few sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, and say how fast it is.",
    "A train travels 60 km in 45 minutes. How far does it travel in two hours? Think step by step.",
)
"""Prose, code and arithmetic."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """The `prompt` of each line of a JSONL file; empty lines are passed over. Raises PromptError, naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise PromptError(f"prompts {path}: {error.strerror}; give a file that can be read") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts {path}: byte {error.start} is not UTF-8; give a JSONL file") from error
    prompts = tuple(_prompt(line, f"prompts {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip())
    if not prompts:
        raise PromptError(f'prompts {path}: the file has no line; give one {{"prompt": "..."}} a line')
    return prompts


def _prompt(line: str, source: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise PromptError(f'{source}: not JSON; give one {{"prompt": "..."}} a line') from error
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise PromptError(f'{source}: there is no text under "prompt"; give one {{"prompt": "..."}} a line')
    return prompt
