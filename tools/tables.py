"""Make the tables and plots of README and docs from the result files of the benchmarks, or say which are stale.

    python tools/tables.py            # write them
    python tools/tables.py --check    # write nothing; exit status 1 if a table or plot is not what its results give

A table stands in a document between `<!-- table: NAME -->` and `<!-- end of table -->`; the newest result file of a name counts.
Plots carry a digest of what they were drawn from, so that checking them does not draw.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from evidence.plots import PLOTS, draw, is_current
from evidence.results import MissingResultError
from evidence.tables import TABLES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACE = re.compile(
    r"(?P<head><!-- table: (?P<name>[a-z-]+) -->\n)(?:(?!<!-- table:).)*?(?P<foot><!-- end of table -->)", re.DOTALL
)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    try:
        stale = list(refresh(is_written=not parser.parse_args().check))
    except MissingResultError as error:
        print(f"error: {error}; run its benchmark first", file=sys.stderr)
        return 2
    for path in stale:
        print(f"{path.relative_to(ROOT)}: not what the result files give; run python tools/tables.py", file=sys.stderr)
    return 1 if stale else 0


def refresh(*, is_written: bool) -> Iterator[Path]:
    """Documents and plots that are stale; where they are written, none is any more."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        made = with_tables(text)
        if made == text:
            continue
        if is_written:
            document.write_text(made, encoding="utf-8")
        else:
            yield document
    for plot in PLOTS:
        if is_current(plot):
            continue
        if is_written:
            draw(plot)
        else:
            yield plot.path


def with_tables(text: str) -> str:
    """The document with each table as its results give it. Raises KeyError where it names a table that there is not."""
    assert len(PLACE.findall(text)) == text.count("<!-- table:"), "a table without its end"
    return PLACE.sub(lambda place: place["head"] + "\n".join(TABLES[place["name"]]()) + "\n" + place["foot"], text)


if __name__ == "__main__":
    sys.exit(main())
