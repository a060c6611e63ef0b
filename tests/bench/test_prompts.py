"""Prompts of a file: taken line by line, and refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_sirius.bench.prompts import read_prompts
from offload_sirius.errors import PromptError


def written(folder: Path, content: bytes) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(content)
    return path


def test_the_prompt_of_each_line_is_taken_and_all_else_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path, b'{"id": 1, "prompt": "one"}\n\n{"prompt": "zw\xc3\xb6lf"}\n')
    assert read_prompts(path) == ("one", "zwölf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "one"}\nnot json\n', 'line 2: not JSON; give one {"prompt": "..."} a line'),
        (b'["one"]\n', 'line 1: there is no text under "prompt"; give one {"prompt": "..."} a line'),
        (b'{"prompt": 3}\n', 'line 1: there is no text under "prompt"; give one {"prompt": "..."} a line'),
        (b'{"prompt": ""}\n', 'line 1: there is no text under "prompt"; give one {"prompt": "..."} a line'),
    ],
)
def test_a_line_without_a_prompt_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    assert str(caught.value) == f"prompts {path}, {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", 'the file has no line; give one {"prompt": "..."} a line'),
        (b"\xff\n", "byte 0 is not UTF-8; give a JSONL file"),
    ],
)
def test_a_file_without_prompts_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    assert str(caught.value) == f"prompts {path}: {message}"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError) as caught:
        read_prompts(tmp_path / "none.jsonl")
    assert str(caught.value) == f"prompts {tmp_path}/none.jsonl: No such file or directory; give a file that can be read"
