"""Where the prompt comes from: --prompt, --prompt-file, or standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from offload_sirius.errors import PromptError

STDIN = "-"


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text. One line break at the end of a file is the file's and not the prompt's. Raises PromptError."""
    if prompt is not None and prompt_file is not None:
        raise PromptError("--prompt and --prompt-file are both given; give one of them")
    if prompt is not None:
        return prompt
    if prompt_file is not None and prompt_file != STDIN:
        return _text(_bytes_of(Path(prompt_file)), f"prompt file {prompt_file}")
    # Python has no sys.stdin where the shell closed it.
    if sys.stdin is None or (prompt_file is None and sys.stdin.isatty()):
        raise PromptError("there is no prompt; give --prompt TEXT, --prompt-file FILE, or text on standard input")
    return _text(_stdin_bytes(), "standard input")


def _stdin_bytes() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise PromptError(f"standard input: {error.strerror}; give --prompt TEXT or --prompt-file FILE") from error


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PromptError(f"prompt file {path}: {error.strerror}; give a file that can be read") from error


def _text(content: bytes, source: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source}: byte {error.start} is 0x{content[error.start]:02x}, not UTF-8; "
            "convert it, for example with iconv -t utf-8"
        ) from error
    return text.removesuffix("\n").removesuffix("\r")
