"""Result files: whether they can be written, asked before the work begins, and written whole or not at all. Knows no content."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from offload_sirius.errors import ConfigError


def require_writable(path: Path, flag: str) -> None:
    """Raises ConfigError, naming the flag that asked for it, where a file cannot be written there."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; name a file in it")
    if _is_special(path):
        return
    path = path.resolve()
    try:
        partial = _partial(path)
        partial.touch(exist_ok=False)
        partial.unlink()
    except OSError as error:
        raise _unwritable(path, error, f"{flag} ") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is complete. Raises ConfigError."""
    if _is_special(path):
        _write_into(path, content)
        return
    # Beside the target, so that the last step is a rename within one file system. A link stays one.
    path = path.resolve()
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        # Gone already where all went well; else this also runs on KeyboardInterrupt.
        partial.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    """A device or a pipe, which is written into and must not be replaced."""
    return path.exists() and not path.is_file()


def _write_into(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


def _unwritable(path: Path, error: OSError, flag: str = "") -> ConfigError:
    return ConfigError(f"{flag}{path}: cannot be written: {error.strerror}; name a file in a folder that can be written to")
