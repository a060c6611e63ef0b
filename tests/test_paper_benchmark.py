"""benchmarks/paper.py: its arithmetic by hand, and all of it once on models that are nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from offload_sirius.bench.variants import FULL
from offload_sirius.config import DecodingConfig

MODEL = "synthetic:tiny?layers=24&dtype=F32"
QUICK = ("--quick", "--device", "cpu", "--threads", "1", "--model", MODEL, "--real-model", "synthetic:tiny?dtype=F32")


@pytest.fixture(scope="module")
def paper() -> Iterator[ModuleType]:
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.insert(0, folder)
    import paper

    yield paper
    sys.path.remove(folder)


@pytest.fixture
def result(paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of the half that is asked for, beside another one that is there already."""
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", "")  # the script has one of its own
    out = tmp_path / "result.json"
    out.write_text(json.dumps({"table": "before", "ablations": "before", "date": "before"}))
    rates = ("--link-gbps", "0.5", "--ablations-link-gbps", "0.5")
    monkeypatch.setattr(sys, "argv", ["paper.py", *QUICK, *rates, "--only", request.param, "--out", str(out)])
    assert paper.main() == 0
    assert list(tmp_path.iterdir()) == [out], "what was written on the way is gone"
    return dict(json.loads(out.read_text()))


def test_five_windows_of_the_papers_aal_are_76_tokens(paper: ModuleType) -> None:
    from paper_cases import Case
    from paper_table import PAPERS_AAL

    case = Case(name="", decoding=DecodingConfig(window=16), num_units=5, aal=PAPERS_AAL)
    assert (case.sizes, case.models_decide) == ([15, 15, 15, 15, 16], False)
    assert Case(name="", decoding=FULL, num_units=3).sizes == [1, 1, 1]
    assert Case(name="", decoding=DecodingConfig(), num_units=3).models_decide
    assert Case(name="", decoding=DecodingConfig(window=4), num_units=4, aal=Fraction("2.5")).sizes == [2, 3, 2, 3]


def test_the_published_sirius_is_below_its_own_floor(paper: ModuleType) -> None:
    from paper_table import PUBLISHED

    rows = PUBLISHED["rows"]
    assert rows["sirius"]["seconds_per_token"] < PUBLISHED["floor_seconds_per_token"] == pytest.approx(3.704, abs=1e-3)
    assert round(rows["sirius"]["ratio_to_full"], 3) == 0.643


def test_what_takes_too_long_or_is_missing_does_not_hold(paper: ModuleType) -> None:
    from paper_table import held_of

    sirius = {"group": "paper", "name": "sirius, the paper's AAL", "ratio_to_full": 0.66}
    hot = {"group": "int4 on the card", "name": "hot set, the paper's AAL", "ratio_to_full": 0.1}
    rows = [sirius, hot | {"ratio_to_full_same_memory": 0.3}]
    lost = [{"group": "paper", "names": ["sparse"], "problem": "no"}]

    def holds(*rows: dict[str, Any], problems: list[dict[str, Any]], is_quick: bool = False) -> list[bool]:
        return [each.holds for each in held_of({"rows": rows, "problems": problems}, is_quick=is_quick)]

    assert holds(*rows, problems=[]) == [True] * 4
    assert holds(rows[0] | {"ratio_to_full": 0.67}, problems=[]) == [True, False, False, False]
    assert holds(rows[0], hot | {"ratio_to_full_same_memory": 0.31}, problems=lost) == [False, True, True, False]
    assert holds(problems=lost, is_quick=True) == [False]


@pytest.mark.parametrize("result", ["table"], indirect=True)
def test_the_table_has_the_papers_setting_and_the_cards(result: dict[str, Any]) -> None:
    table = result["table"]
    rows = {(row["group"], row["name"]): row for row in table["rows"]}
    assert result["ablations"] == "before"
    # In so narrow a model the copy has no room: what cannot be measured is said.
    assert [(each["group"], each["names"]) for each in table["problems"]] == [("bfloat16 on the card", ["copy in 4 bits"])]
    full, sparse, sirius = (rows["paper", name] for name in ("full", "sparse", "sirius, the paper's AAL"))
    assert (full["bytes_ratio"], sirius["aal"], sirius["num_windows"]) == (1.0, 15.0, 1)
    # The floor, with the share of a pass that a draft step brings and the tokens of the one window.
    assert sirius["bytes_ratio"] == pytest.approx((15 * sparse["bytes_ratio"] + 1) / 15, rel=1e-9)
    assert sirius["without_last_correction"] < sirius["seconds_per_token"] == pytest.approx(sirius["runs"][0])
    int4, bfloat16 = ("int4 on the card", "bfloat16 on the card")
    assert list(table["cards"]) == [int4, bfloat16]
    assert table["cards"][int4]["num_hot_layers"] == 24 > table["cards"][bfloat16]["num_hot_layers"] >= 2
    assert table["cards"][int4]["layers_share"] == pytest.approx(0.593, abs=1e-3)
    ways = [(each["accept"], each["window"], each["keep"]) for each in table["acceptance"]]
    assert ways == [
        (*way, table["cards"][card]["hot_share"]) for card in (int4, bfloat16) for way in (("exact", 8), ("threshold", 16))
    ]
    assert [each["holds"] for each in table["held"]] == [True], "one window is not judged"
    for group in (int4, bfloat16):
        own = rows[group, "full, same device memory"]
        hot = rows[group, "hot set, the paper's AAL"]
        assert own["ratio_to_full_same_memory"] == 1.0
        assert hot["bytes_ratio"] < own["bytes_ratio"] < 1


@pytest.mark.parametrize("result", ["ablations"], indirect=True)
def test_the_ablations_have_one_thing_changed_each(result: dict[str, Any]) -> None:
    ablations = result["ablations"]
    rows = {(row["what"], row["value"]): row for row in ablations["rows"]}
    assert result["table"] == "before"
    assert list(dict.fromkeys(what for what, _ in rows)) == [
        "threshold",
        "window",
        "tree width",
        "KV rewriting",
        "rollback",
        "refresh",
    ]
    base = {key for key, row in rows.items() if row["is_base"]}
    assert base == {
        ("threshold", "0.1"),
        ("window", "16"),
        ("tree width", "1"),
        ("KV rewriting", "on"),
        ("rollback", "on"),
    }
    exact = rows["threshold", "exact"]
    assert (exact["own_agreement"], exact["full_agreement"], exact["num_identical"]) == (1.0, 1.0, 1)
    # 16 tokens: the full model's first one, and one window.
    assert rows["rollback", "off"]["aal"] == 15.0
    # With the same neurons, wherever they are, drafts are the same.
    assert rows["refresh", "off"]["aal"] == rows["window", "16"]["aal"]
    assert rows["refresh", "off"]["bytes_ratio"] < rows["window", "16"]["bytes_ratio"]
    # Bytes that are reckoned for the base are those that are counted where it goes over the link.
    assert ablations["on_link"]["base"]["nbytes_per_token"] == pytest.approx(rows["window", "16"]["nbytes_per_token"])
    assert [key for key, row in rows.items() if row["on_link"]] == [("window", "auto"), ("refresh", "off"), ("refresh", "on")]
    assert len(json.dumps(result, indent=1)) < 60_000


def test_a_users_error_is_one_line(
    paper: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", "")
    monkeypatch.setattr(sys, "argv", ["paper.py", "--model", "synthetic:none", "--device", "cpu", "--quick", "--out", str(out)])
    assert paper.main() == 2
    assert capsys.readouterr().err.startswith("error: synthetic:none: shape 'none' is not known")
    assert not out.exists()
    monkeypatch.setattr(sys, "argv", ["paper.py", "--windows", "0", "--out", str(out)])
    assert paper.main() == 2
    assert capsys.readouterr().err == "error: --windows is 0; give 1 or more\n"
