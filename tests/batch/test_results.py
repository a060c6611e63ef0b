"""Answers on disk: whenever a run is killed, the next one goes on, and the file is that of an unbroken one."""

from __future__ import annotations

import resource
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_sirius.batch.lines import Id
from offload_sirius.batch.results import Results, journal_path, line_of, read_finished
from offload_sirius.errors import ConfigError

IDS: list[Id] = ["a", 1, "1", "é", "\ud800", 5, 6, 7]
ASKED: dict[str, Any] = {"input": "digest", "window": "auto", "stop": ["x"]}


def answer(place: int) -> dict[str, Any]:
    return {"id": IDS[place]} | ({"error": "too long"} if place == 2 else {"text": "word\n" * place})


WHOLE = b"".join(line_of(answer(place)) for place in range(len(IDS)))


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int, bool]]]:
    """An order in which answers end, and after how many of them a process is killed, by how much of a line, in which file."""
    order = draw(st.permutations(range(len(IDS))))
    kill = st.tuples(st.integers(0, len(IDS)), st.integers(0, 12), st.booleans())
    return list(order), draw(st.lists(kill, max_size=4))


@settings(deadline=None, max_examples=20)
@given(run=runs(), num_processes=st.integers(1, 3))
def test_a_run_that_is_killed_at_any_moment_goes_on_and_gives_the_same_file(
    run: tuple[list[int], list[tuple[int, int, bool]]], num_processes: int
) -> None:
    order, kills = run
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out.jsonl"
        for num_added, num_left, in_output in kills:
            finished = read_finished(out, IDS, ASKED)
            places = [place for place in order if not finished.has(place)][:num_added]
            processes = [Results(out, IDS, ASKED, index) for index in range(num_processes)]
            for count, place in enumerate(places):
                processes[count % num_processes].add(place, answer(place))
            for each in processes:
                each.close()
            half = out if in_output else journal_path(out, 0)
            if half.exists():
                half.write_bytes(half.read_bytes() + line_of(answer(7))[:num_left])
        last = Results(out, IDS, ASKED)
        for place in order:
            last.add(place, answer(place))
        last.complete()
        last.close()
        assert out.read_bytes() == WHOLE
        assert last.num_errors == 1
        assert list(Path(folder).iterdir()) == [out]
        assert read_finished(out, IDS, ASKED).num_written == len(IDS)


def test_answers_are_in_the_output_as_soon_as_it_is_their_turn(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    results = Results(out, IDS, ASKED)
    seen = []
    for place in (1, 0, 3, 2):
        results.add(place, answer(place))
        seen.append(out.read_bytes().count(b"id"))
    assert seen == [0, 2, 2, 4]
    results.close()


def test_prompts_that_were_added_to_the_input_are_answered(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(WHOLE)
    finished = read_finished(out, [*IDS, "new"], ASKED)
    assert [finished.has(place) for place in (0, len(IDS) - 1, len(IDS))] == [True, True, False]


REFUSED = {
    "another order": (
        line_of(answer(1)),
        b"",
        r'out.jsonl: line 1 is not the answer to id "a": it is no output of this input',
    ),
    "text": (b"notes\n", b"", r"out.jsonl: line 1 is not the answer to id"),
    "text without a line break": (b"notes", b"", r"its last line is not whole, and out.jsonl.partial is not there; name another"),
    "more lines": (WHOLE + line_of(answer(0)), b"", r"out.jsonl: line 9 is not nothing: it is no output of this input"),
    "another setting": (
        b"",
        line_of(ASKED | {"window": 4}),
        r"out.jsonl: was begun with another window: 4, and now it is auto; give what it was begun with, or name another --out",
    ),
    "another program": (b"", b"hello\n", r"out.jsonl.partial: is not what this command has written; remove it, or name another"),
}


@pytest.mark.parametrize(("output", "journal", "message"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_something_else_is_left_as_it_is(output: bytes, journal: bytes, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(output)
    if journal:
        journal_path(out, 0).write_bytes(journal)
    for open_it in (read_finished, Results):
        with pytest.raises(ConfigError, match=message):
            open_it(out, IDS, ASKED)
        assert out.read_bytes() == output
        assert journal_path(out, 0).exists() == bool(journal)


def test_where_no_prompt_has_its_answer_nothing_stays(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    Results(out, IDS, ASKED).close()
    Results(out, IDS, ASKED | {"window": 4}).close()
    assert list(tmp_path.iterdir()) == []


def test_two_runs_do_not_write_the_same_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first = Results(out, IDS, ASKED)
    with pytest.raises(ConfigError, match=r"out.jsonl.partial: another run is writing it; wait for its end, or name another"):
        Results(out, IDS, ASKED)
    first.close()


def add_all(results: Results, places: tuple[int, ...]) -> None:
    for place in places:
        results.add(place, {"id": IDS[place], "text": "word" * 7})


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_a_full_disk_is_one_line_and_what_is_complete_stays(order: tuple[int, ...], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    results = Results(out, IDS, ASKED)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        with pytest.raises(ConfigError, match="cannot be written: File too large; what is complete was kept, and the same"):
            add_all(results, order)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        results.close()
    assert all(path.read_bytes()[-1:] in (b"", b"\n") for path in tmp_path.iterdir())
    assert read_finished(out, IDS, ASKED).num_done > 0
