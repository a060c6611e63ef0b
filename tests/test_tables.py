"""Tables and plots of the documents: that they are what the result files give, and that a stale one is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts_are_found() -> Iterator[None]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield
    sys.path.remove(str(ROOT / "tools"))


def test_documents_are_what_the_result_files_give() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "tables.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_changed_figure_makes_a_table_stale() -> None:
    import tables

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.with_tables(text) == text
    begin = text.index("<!-- table: answers -->")
    row = text.index("a pass takes ", begin)
    assert tables.with_tables(text[:row] + "it takes " + text[row + len("a pass takes ") :]) == text


def test_every_table_stands_in_a_document() -> None:
    import tables

    texts = [document.read_text(encoding="utf-8") for document in tables.DOCUMENTS]
    named = {place["name"] for text in texts for place in tables.PLACE.finditer(text)}
    assert named == set(tables.TABLES)


def test_the_newest_result_of_a_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evidence import results

    for name, value in (("speed-2026-01-31", 1), ("speed-2026-11-02", 2), ("speed-of-light-2027-01-01", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"value": value}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    results.newest.cache_clear()
    try:
        assert results.newest("speed")["value"] == 2
        with pytest.raises(results.MissingResultError, match="taste"):
            results.newest("taste")
    finally:
        results.newest.cache_clear()


def test_a_plot_is_stale_when_it_was_drawn_from_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evidence import plots

    monkeypatch.setattr(plots, "FOLDER", tmp_path)
    plot = plots.PLOTS[0]
    assert not plots.is_current(plot)
    plots.draw(plot)
    assert plots.is_current(plot)
    plot.path.write_text(plot.path.read_text().replace(plot.mark, "<!-- of something else -->\n"))
    assert not plots.is_current(plot)


def test_a_table_without_its_end_is_not_taken_for_one() -> None:
    import tables

    with pytest.raises(AssertionError, match="without its end"):
        tables.with_tables("<!-- table: decode -->\nprose\n<!-- table: hotset -->\n<!-- end of table -->\n")
