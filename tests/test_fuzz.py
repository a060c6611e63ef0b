"""A small part of what tools/fuzz.py runs: the same cases every time. Whatever it has found once has a test of its own beside."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload_sirius.model import chat_template

ROOT = Path(__file__).parents[1]
NUM_CASES = 1200


@pytest.fixture(scope="module")
def _tools() -> Iterator[None]:
    before, seconds = list(sys.path), chat_template.RENDER_SECONDS
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    yield
    sys.path[:] = before
    chat_template.RENDER_SECONDS = seconds


@pytest.mark.usefixtures("_tools")
def test_no_broken_file_does_anything_but_open_or_be_refused_in_one_line(tmp_path: Path) -> None:
    import fuzz

    corpus = fuzz.make_corpus(tmp_path / "corpus")
    (tmp_path / "work").mkdir()
    judge = fuzz.Judge(corpus, tmp_path / "work")
    tally = fuzz.Tally()
    for number in range(NUM_CASES):
        case = fuzz.case_of(corpus, 0, number)
        verdict = judge.judge(fuzz.Case(case.model, case.files, case.deep, chat=False))
        assert verdict.outcome != "found", (number, verdict.signature, verdict.detail)
        tally.add(number, case.model, verdict)
    # Most are refused, some open, a few answer: else nothing was tried.
    assert tally.outcomes["CheckpointError"] > NUM_CASES / 3
    assert tally.outcomes["opened"] > NUM_CASES / 20
    assert tally.outcomes["answered"] > 0


@pytest.mark.usefixtures("_tools")
def test_a_reader_that_believes_a_file_is_found() -> None:
    from fuzzing import check

    class Believing:
        num_rows = 2

        def ranges(self, first: int, count: int) -> list[tuple[Path, int, int]]:
            return [(Path("/m/file"), 0, 4096 * count)]

    with pytest.raises(AssertionError, match="reads outside of file"):
        check._check_ranges(Believing(), {Path("/m/file"): 8191})  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="reads /m/file, outside of its folder"):
        check._check_ranges(Believing(), {})  # type: ignore[arg-type]
    assert check._bad_line("a\x1b[31mb").startswith("an error whose line is not printable")
    assert check._bad_line("a" * 2000).startswith("an error of 1500 characters and more")
    assert check._bad_line("a.json: is broken; download it again") == ""
