"""Decoding measured on a small model: bytes by hand, answers beside the full model's, loads and budgets."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from offload_sirius.bench.answers import Answer
from offload_sirius.bench.decode import DecodeReport, NoWatch, decode_config, measure_decode
from offload_sirius.bench.variants import FULL, DecodeBench, variants_of
from offload_sirius.config import DecodingConfig, EngineConfig, GenerationConfig, SamplingConfig
from offload_sirius.engine import Engine, open_model
from offload_sirius.engine.placement import place
from offload_sirius.errors import PromptError
from offload_sirius.weights.layout import layer_layout

MODEL = "synthetic:tiny?dtype=F32&layers=6&positions=128"
CONFIG = EngineConfig(model=MODEL, device="cpu", threads=1)
OPENED = open_model(MODEL)
PROMPTS = ("one and two", "three")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path / "cache"))


def bench_of(*, forced_aal: str | None = None, max_new_tokens: int = 12, temperature: float = 0.0, **lists: Any) -> DecodeBench:
    plain: dict[str, Any] = {
        "modes": ["sparse", "sirius"],
        "sparsities": ["griffin"],
        "keeps": [0.5],
        "windows": ["4"],
        "accepts": ["exact"],
        "threshold": 0.1,
        "tree_widths": [1],
        "drafts": ["streamed"],
        "refresh": True,
        "refresh_decay": 0.7,
        "lookup": None,
    }
    return DecodeBench(
        prompts=PROMPTS,
        variants=variants_of(**plain | lists),
        generation=GenerationConfig(max_new_tokens=max_new_tokens, sampling=SamplingConfig(temperature=temperature)),
        forced_aal=None if forced_aal is None else Fraction(forced_aal),
    )


def measured(bench: DecodeBench, *, all_streamed: bool = True, **settings: Any) -> DecodeReport:
    config = decode_config(OPENED, replace(CONFIG, **settings), bench, all_streamed=all_streamed)
    return measure_decode(config, bench)


def test_the_bytes_of_a_forced_advance_are_those_of_its_drafts_and_of_one_full_pass() -> None:
    report = measured(bench_of(forced_aal="3.5", max_new_tokens=15))
    full, sparse, sirius = report.rows
    num_kept = DecodingConfig().num_kept(OPENED.spec.ffn_width)
    layout = layer_layout(OPENED.spec, 4, num_kept)
    draft_nbytes = 6 * (layout.part_nbytes("attention") + layout.part_nbytes("kept"))
    full_nbytes = 6 * layout.nbytes
    assert (report.max_new_tokens, report.forced_aal, report.pass_nbytes) == (15, 3.5, full_nbytes)
    assert full.nbytes_per_token == full_nbytes
    assert (sparse.nbytes_per_token, sparse.draft_nbytes) == (draft_nbytes, draft_nbytes)
    # Four windows of 3 + 4 + 3 + 4 tokens: each of three drafts and a correction, the last one like the others.
    assert (sirius.aal, sirius.draft_nbytes) == (3.5, draft_nbytes)
    assert sirius.nbytes_per_token == pytest.approx((3 * draft_nbytes + full_nbytes) / 3.5, rel=1e-12)


def test_exact_rows_have_the_full_models_answers() -> None:
    report = measured(bench_of(tree_widths=[1, 2], sparsities=["griffin", "cats"]))
    assert report.num_prompts == 2
    corrected = [row for row in report.rows if row.mode == "sirius"]
    assert len(corrected) == 4
    assert [(row.agreement, row.num_identical) for row in corrected] == [(1.0, 2)] * 4
    assert all(row.aal is not None and 1 <= row.aal <= 4 for row in corrected)
    assert all(row.draft_seconds and row.correction_seconds for row in corrected)


def test_sampled_rows_are_the_full_models_too_by_their_seed() -> None:
    *_, corrected = measured(bench_of(modes=["sirius"], temperature=1.0)).rows
    assert corrected.num_identical == 2


def test_without_a_budget_nothing_is_resident_in_any_load_and_all_have_the_same() -> None:
    bench = bench_of(tree_widths=[1, 8], sparsities=["griffin", "cats"])
    config = decode_config(OPENED, CONFIG, bench, all_streamed=True)
    plans = [place(OPENED.checkpoint, replace(config, decoding=load[-1])).plan for load in bench.loads]
    assert [(len(plan.streamed_layers), plan.num_cached_neurons) for plan in plans] == [(6, 0)] * 3
    assert all(plan.device_nbytes <= int(config.device_memory) for plan in plans)


def test_the_full_model_gets_the_plan_that_is_best_for_it() -> None:
    bench = bench_of()
    plan = place(OPENED.checkpoint, decode_config(OPENED, CONFIG, bench, all_streamed=True)).plan
    # Drafts need some memory of their own, so that theirs has no room for the layer.
    report = measured(bench, all_streamed=False, device_memory=str(plan.device_nbytes + plan.layer_nbytes))
    assert [row.num_resident_layers for row in report.rows] == [1, 0, 0]


def test_where_a_rate_is_set_a_draft_is_held_against_its_bytes() -> None:
    _, sparse, sirius = measured(bench_of(), link_gbps=0.5).rows
    for row in (sparse, sirius):
        assert row.draft_seconds is not None
        assert row.draft_nbytes is not None
        assert row.draft_link_ratio == pytest.approx(row.draft_seconds / (row.draft_nbytes / 0.5e9))
    assert measured(bench_of()).rows[1].draft_link_ratio is None


def test_what_has_been_measured_before_is_not_again() -> None:
    bench = bench_of()
    config = decode_config(OPENED, CONFIG, bench, all_streamed=True)
    watch = Collecting()
    first = measure_decode(config, bench, watch=watch)
    assert list(watch.answers) == [FULL, *bench.variants]
    names = [row.name for row in first.rows for _ in PROMPTS]
    assert watch.said == [(name, number, 6) for number, name in enumerate(names, 1)]
    again = Collecting()
    assert measure_decode(config, bench, watch=again, known=watch.answers) == first
    assert (again.num_loads, again.said) == (0, [])


class Collecting(NoWatch):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.said: list[tuple[str, int, int]] = []
        self.answers: dict[DecodingConfig, Any] = {}

    def loaded(self, engine: Engine) -> None:
        self.num_loads += 1

    def answered(self, name: str, num_answers: int, num_all: int) -> None:
        self.said.append((name, num_answers, num_all))

    def measured(self, variant: DecodingConfig, answers: Any) -> None:
        assert all(isinstance(answer, Answer) for answer in answers)
        self.answers[variant] = answers


@pytest.mark.parametrize(
    ("bench", "needed"),
    [(bench_of(max_new_tokens=120), 120), (bench_of(forced_aal="4", max_new_tokens=117, modes=["sirius"]), 117 + 4)],
)
def test_a_prompt_without_room_for_its_answer_is_named(bench: DecodeBench, needed: int) -> None:
    with pytest.raises(PromptError) as caught:
        decode_config(OPENED, CONFIG, bench, all_streamed=True)
    assert str(caught.value) == (
        f"prompt 1 has 11 tokens and its answer takes {needed} positions, {MODEL} has 128; "
        "leave that prompt out, or give a smaller --max-new-tokens"
    )


def test_a_prompt_that_is_too_long_by_itself_is_named() -> None:
    bench = replace(bench_of(), prompts=("one", "x" * 200))
    with pytest.raises(PromptError, match=r"^prompt 2: the prompt has 200 tokens, .* takes 128 positions"):
        decode_config(OPENED, CONFIG, bench, all_streamed=True)


def test_json_is_plain_values_row_by_row() -> None:
    told = measured(bench_of()).as_json()
    assert [row["name"] for row in told["rows"]] == [
        "full",
        "griffin 0.5 streamed sparse",
        "griffin 0.5 streamed sirius exact w4",
    ]
    assert set(told["rows"][0]["seconds_per_token"]) == {"median", "lowest", "highest"}
