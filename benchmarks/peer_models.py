"""The model that all systems of a comparison run, in the files that each of them wants, and what it cost to write those.

A prompt is token ids. Folders that are written here have a tokenizer whose words are the ids in digits, so that every program
that wants a text gets exactly those. Files are kept and used again; beside them is how long they took.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from children import LONGEST_ERROR, folder_nbytes

from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.writer import write_checkpoint

TOOLS = Path(__file__).resolve().parents[1] / "tools"


class NotPreparedError(Exception):
    """A system's own files could not be written; says why in one line."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Files that were written once before a system could run."""

    nbytes: int
    seconds: float


def prepared(path: Path, write: Callable[[Path], None], source: Path | None = None) -> Preparation:
    """What it cost to write a file or folder, which is written where it is not there.

    source: the folder that it is a copy of, if any; where files there have changed, the copy is made anew.
    Raises NotPreparedError.
    """
    note, stamps = path.with_name(f"{path.name}.written.json"), stamps_of(source)
    cost = noted(note, stamps) if path.exists() else None
    if cost is None:
        print(f"writing {path}", flush=True)
        try:
            remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            began = time.perf_counter()
            write(path)
            cost = Preparation(nbytes=folder_nbytes(path), seconds=time.perf_counter() - began)
            note.write_text(json.dumps(asdict(cost) | {"source": stamps}))
        except OSError as error:
            raise NotPreparedError(f"{path} cannot be written: {error}") from error
    return cost


def stamps_of(source: Path | None) -> list[list[Any]]:
    """Name, size and time of change in nanoseconds of each file of a folder."""
    if source is None:
        return []
    files = sorted(file for file in source.rglob("*") if file.is_file())
    return [[str(file.relative_to(source)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def noted(note: Path, stamps: list[list[Any]]) -> Preparation | None:
    """What a copy of these files has cost; None where none is noted."""
    try:
        known = json.loads(note.read_text())
        return Preparation(nbytes=known["nbytes"], seconds=known["seconds"]) if known.get("source", []) == stamps else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def remove(path: Path) -> None:
    """A file, a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_folder(model: str, folder: Path) -> None:
    """safetensors, config.json, and the tokenizer of digits. Raises CheckpointError."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    checkpoint = open_checkpoint(model)
    write_checkpoint(checkpoint, folder)
    words = {str(token_id): token_id for token_id in range(checkpoint.spec.vocab_size)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def as_text(ids: list[int]) -> str:
    """For the tokenizer of digits."""
    return " ".join(map(str, ids))


def write_gguf(model: str, file: Path) -> None:
    """In bfloat16, which are the bits of a bfloat16 checkpoint. Raises NotPreparedError."""
    command = [sys.executable, str(TOOLS / "gguf_copy.py"), str(file), "BF16", "--source", model]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        raise NotPreparedError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][-LONGEST_ERROR:])
