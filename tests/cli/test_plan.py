"""`offload-sirius plan`: placement and times by hand, for machines that are not here, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from offload_sirius import machine
from offload_sirius.engine.planning import HOST_RESERVE_NBYTES
from offload_sirius.rates import NAMES, rates_file, rates_from, write_rates
from offload_sirius.units import GIB

from ..loaders.quantised import WAYS, write_pair
from .conftest import TINY, Run

LLAMA_70B = (
    *("--model", "llama-3-70b", "--device-memory", "24GiB", "--host-memory", "64GiB", "--link-gbps", "25"),
    *("--device-tflops", "165", "--device-gbps", "1008", "--mode", "full"),
)
LAYER = 2 * (150_994_944 + 704_643_072 + 16_384)
HEAD = 2 * 1_050_673_152
NUM_LAYERS, CONTEXT, PROMPT = 80, 4096, 512


@pytest.fixture(autouse=True)
def _not_in_the_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius_loaders.shape.is_cached", lambda _: False)


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "may_have_gpu", lambda: False)


def planned(run: Run, *arguments: str) -> dict[str, Any]:
    ran = run("plan", *arguments, "--json")
    assert (ran.code, ran.out.count("\n")) == (0, 1), ran.err
    found: dict[str, Any] = json.loads(ran.out)
    return found


def test_llama_3_70b_on_a_card_of_24_gib_by_hand(run: Run) -> None:
    report = planned(run, *LLAMA_70B)
    plan = report["plan"]

    # What the device holds beside layers: head, final norm, 2 * 80 * 8 * 128 values a position, and small things.
    cache = 2 * NUM_LAYERS * 8 * 128 * CONTEXT * 2
    assert (plan["device_bill"]["head"], plan["device_bill"]["kv_cache"]) == (HEAD, cache)
    small = plan["device_bill"]["position_tables"] + plan["device_bill"]["activations"]
    room = (24 * GIB - HEAD - 2 * 8192 - cache - small) // LAYER
    num_resident = room - 2
    assert (len(plan["resident_layers"]), plan["num_slots"]) == (num_resident, 2)

    # What the host holds beside layers: the embedding table, two staging buffers, the readers.
    room = (64 * GIB - HEAD - 2 * LAYER - plan["host_bill"]["readers"]) // LAYER
    num_disk = NUM_LAYERS - num_resident - room
    assert (len(plan["host_layers"]), len(plan["disk_layers"])) == (room, num_disk)

    token = report["token_bill"]
    num_streamed = NUM_LAYERS - num_resident
    assert plan["pass_nbytes"] == token["link_nbytes"] == num_streamed * LAYER
    assert token["copy_seconds"] == pytest.approx(num_streamed * LAYER / 25e9)
    assert token["disk_seconds"] == pytest.approx(num_disk * LAYER / 3e9)
    assert token["weights_seconds"] == pytest.approx(NUM_LAYERS * LAYER / 1008e9)
    positions = (PROMPT + CONTEXT) // 2
    assert token["mixing_seconds"] == pytest.approx(NUM_LAYERS * 2 * 8 * 128 * positions * 2 / 1008e9)
    assert token["head_seconds"] == pytest.approx(HEAD / 1008e9)
    assert report["prompt_bill"]["weights_seconds"] == pytest.approx(NUM_LAYERS * LAYER * PROMPT / 165e12)

    predicted = plan["predicted"]
    assert predicted["bound"] == "disk"
    # While a layer is uploaded, the slot for the next one from disk is not free yet: the disk waits as long.
    upload = num_disk * LAYER / 25e9
    assert num_disk * LAYER / 3e9 < predicted["seconds_per_token"] < num_disk * LAYER / 3e9 + 1.05 * upload
    loaded = 2 * HEAD + 2 * 8192 + (num_resident + room) * LAYER
    assert predicted["load_seconds"] == pytest.approx(loaded / 3e9)


def test_with_memory_for_all_layers_a_token_takes_their_bytes_over_the_link(run: Run) -> None:
    report = planned(run, *LLAMA_70B, "--host-memory", "200GiB")
    plan = report["plan"]
    assert plan["predicted"]["bound"] == "link"
    assert plan["predicted"]["seconds_per_token"] == pytest.approx((NUM_LAYERS - len(plan["resident_layers"])) * LAYER / 25e9)


def test_the_tables_show_the_arithmetic(run: Run) -> None:
    ran = run("plan", *LLAMA_70B)
    assert (ran.code, ran.err) == (0, "")
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert lines[0] == "llama-3-70b, bfloat16, 4096 positions, 1 sequence, on a device described by the flags"
    assert lines[1] == "shape: the published shape of llama-3-70b, as its weights are not on this machine"
    assert "link 4.79 70 layers: 119.8 GB / 25.00 GB/s = 4.79 s" in lines
    assert "disk 19.4 34 layers from disk: 58.2 GB / 3.00 GB/s = 19.4 s" in lines
    assert any(line.startswith("computing 0.148 80 layers: 136.9 GB / 1008 GB/s = 0.136 s + ") for line in lines)
    assert any("link 25 GB/s (given), disk 3 GB/s (assumed), device memory 1008 GB/s (given)" in line for line in lines)


DRAFTED = (*LLAMA_70B, "--host-memory", "260GiB", "--mode", "sirius", "--draft", "streamed")
KEPT_LAYER = 2 * (150_994_944 + 704_643_072 // 2 + 16_384)


def test_drafts_and_corrections_of_llama_3_70b_by_hand(run: Run) -> None:
    report = planned(run, *DRAFTED, "--window", "4")
    plan, predicted = report["plan"], report["plan"]["predicted"]
    num_streamed = NUM_LAYERS - len(plan["resident_layers"])
    draft, correction = predicted["draft"], predicted["correction"]
    assert draft["nbytes"] == num_streamed * KEPT_LAYER
    assert draft["nbytes"] / correction["nbytes"] == pytest.approx(0.588, abs=5e-4)
    assert draft["seconds"] == pytest.approx(num_streamed * KEPT_LAYER / 25e9)
    assert correction["seconds"] == pytest.approx(num_streamed * LAYER / 25e9)
    assert (correction["window"], correction["acceptance"]) == (4, 0.8)
    expected = [1 + a + a**2 + a**3 for a in (0.8, 0.9, 0.95)]
    for row, num_tokens in zip(predicted["by_acceptance"], expected, strict=True):
        seconds = (3 * num_streamed * KEPT_LAYER + num_streamed * LAYER) / 25e9 / num_tokens
        assert (row["window"], row["tokens_per_window"]) == (4, pytest.approx(num_tokens))
        assert (row["seconds_per_token"], row["tokens_per_second"]) == (pytest.approx(seconds), pytest.approx(1 / seconds))
    assert predicted["seconds_per_token"] == predicted["by_acceptance"][0]["seconds_per_token"]
    assert (predicted["bound"], draft["bound"], correction["bound"]) == ("link", "link", "link")
    assert report["draft_bill"]["link_nbytes"] == draft["nbytes"]
    assert report["correction_bill"]["link_nbytes"] == correction["nbytes"]
    assert report["mode_full"]["seconds_per_token"] == pytest.approx(num_streamed * LAYER / 25e9)


def test_a_plan_for_mode_full_has_no_drafts(run: Run) -> None:
    report = planned(run, *LLAMA_70B)
    assert (report["draft_bill"], report["correction_bill"], report["mode_full"]) == (None, None, None)
    predicted = report["plan"]["predicted"]
    assert (predicted["draft"], predicted["correction"], predicted["by_acceptance"]) == (None, None, [])


def lines_of(run: Run, *arguments: str) -> list[str]:
    ran = run("plan", *arguments)
    assert (ran.code, ran.err) == (0, "")
    return [" ".join(line.split()) for line in ran.out.splitlines()]


def test_the_tables_show_the_arithmetic_of_drafts_and_corrections(run: Run) -> None:
    lines = lines_of(run, *DRAFTED, "--window", "4", "--host-memory", "160GiB")
    assert "device choice of neurons 13.13 MiB" in lines
    assert "host kept neurons for drafts 70 45.94 GiB" in lines
    assert "draft step: link 2.82 70 layers, 0.588 of their bytes: 70.5 GB / 25.00 GB/s = 2.82 s" in lines
    assert any(
        line.startswith("draft step: computing 0.0987 80 layers, 0.64 of their bytes: 87.6 GB / 1008 GB/s = ") for line in lines
    )
    assert "draft step 2.82 1 token, bound by the link; 70.5 GB through the slots" in lines
    assert "correction: link 4.79 70 layers: 119.8 GB / 25.00 GB/s = 4.79 s" in lines
    assert "correction 4.79 4 tokens, bound by the link; 119.8 GB through the slots" in lines
    assert "a token 4.49 (3 * 2.82 s + 4.79 s) / 2.95 tokens, were 80% of the drafted tokens accepted" in lines
    assert "with mode full 4.79 a pass of the full model, planned for that mode" in lines
    assert "acceptance window tokens a window s a token tokens/s" in lines
    assert "0.95 4 3.71 3.57 0.28" in lines


def test_where_the_device_cannot_hold_part_of_every_layer_part_of_the_layers_is_predicted_to_be_faster(run: Run) -> None:
    arguments = (*DRAFTED, "--host-memory", "160GiB", "--draft", "auto", "--keep", "0.5")
    report = planned(run, *arguments)
    partly, streamed = report["candidates"]
    assert (partly["draft"], streamed["draft"]) == ("resident", "streamed")
    assert partly["predicted"]["seconds_per_token"] == pytest.approx(3.994, abs=5e-4)
    assert streamed["predicted"]["seconds_per_token"] == pytest.approx(4.228, abs=5e-4)
    draft, num_streamed = report["plan"]["predicted"]["draft"], NUM_LAYERS - len(report["plan"]["hot"]["layers"])
    assert num_streamed == 62
    assert draft["nbytes"] == num_streamed * KEPT_LAYER
    lines = lines_of(run, *arguments)
    assert "device attention 18 5.07 GiB" in lines
    assert "device hot neurons 18 11.82 GiB" in lines
    assert "draft step: link 2.5 62 layers, 0.588 of their bytes: 62.4 GB / 25.00 GB/s = 2.5 s" in lines
    assert "correction: link 4.75 80 layers, 0.868 of their bytes: 118.8 GB / 25.00 GB/s = 4.75 s" in lines
    assert "bfloat16 resident in 18 of 80 layers 3.99 5.27" in lines


def test_sparse_answers_take_a_draft_step_a_token(run: Run) -> None:
    lines = lines_of(run, *DRAFTED, "--mode", "sparse")
    assert "a token 2.82 a draft step, which nobody corrects" in lines
    assert not any(line.startswith(("correction", "acceptance")) for line in lines)


def test_fine_drafts_have_caches_and_the_link_waits_for_gates(run: Run) -> None:
    arguments = (*DRAFTED, "--device-memory", "60GiB", "--sparsity", "cats")
    report, lines = planned(run, *arguments), lines_of(run, *arguments)
    plan = report["plan"]
    assert plan["num_cached_neurons"] == 14336
    layer = 2 * (150_994_944 + 16_384) + 2 * 28672 * 8192 + (14336 - int(0.6 * 14336)) * 4 * 8192
    num_streamed = NUM_LAYERS - len(plan["resident_layers"])
    assert plan["predicted"]["draft"]["nbytes"] == num_streamed * layer
    assert any(line.startswith(f"device neuron caches {num_streamed} ") for line in lines)


def test_a_plan_says_where_drafts_do_not_pay(run: Run) -> None:
    faster = "mode full is predicted to be faster: "
    resident = lines_of(run, *DRAFTED, "--device-memory", "200GiB")
    assert "nothing is streamed: drafts save no bytes of the link, and resident layers compute all of their neurons" in resident
    assert any(line.startswith(faster) and line.endswith(" s a token; use --mode full") for line in resident)
    assert not any(line.startswith((faster, "nothing is streamed")) for line in lines_of(run, *DRAFTED))
    long_windows = lines_of(run, *DRAFTED, "--window", "40")
    assert any(line.startswith(faster) for line in long_windows)


def test_four_gib_more_of_either_memory_never_make_a_token_slower(run: Run) -> None:
    report = planned(run, *LLAMA_70B)
    usual = report["plan"]["predicted"]["seconds_per_token"]
    more = report["with_4_gib_more"]
    assert more["device"]["seconds_per_token"] < usual
    assert more["host"]["seconds_per_token"] < usual


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from offload_sirius import machine; machine.may_have_gpu = lambda: False; "
        "from offload_sirius.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(str((code, [name for name in ('torch', 'transformers') if name in sys.modules])))"
    )
    quantised, _ = write_pair(WAYS["awq"], tmp_path)
    models = (["synthetic:llama-3-70b", *LLAMA_70B[2:]], ["synthetic:tiny"], [str(quantised), "--prompt-tokens", "8"])
    for arguments in (["--model", *model] for model in models):
        done = subprocess.run([sys.executable, "-c", program, "plan", *arguments], capture_output=True, text=True, check=False)
        assert done.stderr == "(0, [])\n"
        assert "a token" in done.stdout


def test_this_machine_s_plan_is_what_generate_does(run: Run) -> None:
    budgets = (
        "--mode",
        "full",
        "--device-memory",
        "1MiB",
        "--host-memory",
        "100MiB",
        "--max-context",
        "48",
        "--link-gbps",
        "0.5",
    )
    answer = json.loads(run("generate", *TINY, *budgets, "--prompt", "hi", "--max-new-tokens", "8", "--json").out)
    without_threads = TINY[: TINY.index("--threads")]
    report = planned(run, *without_threads, *budgets, "--prompt-tokens", str(answer["prompt_tokens"]))
    assert report["plan"] == answer["plan"]
    passes, link = answer["passes"], answer["link"]["bytes"]
    assert link["prefill"] == report["plan"]["pass_nbytes"] * passes["prefill"]
    assert link["full"] == report["plan"]["pass_nbytes"] * passes["full"] > 0


def test_an_absolute_memory_and_a_link_beyond_this_machine_describe_another(run: Run) -> None:
    beyond = planned(run, "--model", "llama-3-70b", "--device-memory", "24GiB", "--host-memory", "64GiB", "--link-gbps", "1000")
    assert beyond["plan"]["device"] == "described"
    assert beyond["rates"]["link_bytes_per_second"] == {"value": 1e12, "source": "given"}
    emulated = planned(run, "--model", "synthetic:tiny", "--device-memory", "20MiB", "--link-gbps", "0.1")
    assert emulated["plan"]["device"] == "cpu"
    assert emulated["rates"]["link_bytes_per_second"]["source"] == "assumed"


def test_auto_puts_the_fastest_candidate_first(run: Run) -> None:
    report = planned(run, "--model", "synthetic:small?dtype=F32", "--auto", "--draft", "streamed")
    dtypes = [each["dtype"] for each in report["candidates"]]
    seconds = [each["predicted"]["seconds_per_token"] for each in report["candidates"]]
    assert sorted(dtypes) == ["bfloat16", "float32"]
    assert seconds == sorted(seconds)
    assert report["plan"]["dtype"] == dtypes[0]
    found = planned(run, "--model", "synthetic:small?dtype=F32")["candidates"]
    assert sorted((each["dtype"], each["draft"]) for each in found) == [("float32", "resident"), ("float32", "streamed")]


def test_auto_prefers_what_was_measured_to_be_faster(run: Run) -> None:
    from offload_sirius.cache import cache_folder
    from offload_sirius.engine.planning import host_hardware

    slow = rates_from(
        "measured 2026-11-25", **dict.fromkeys(NAMES, 1e6) | dict.fromkeys(SHARES, 1.0) | dict.fromkeys(SECONDS, 1.0)
    )
    write_rates(rates_file(cache_folder()), host_hardware().rates_key("bfloat16"), slow)
    assert planned(run, "--model", "synthetic:small", "--auto")["plan"]["dtype"] == "float32"
    shown = run("plan", "--model", "synthetic:small", "--auto").out
    assert "candidates" in shown


SHARES = [name for name in NAMES if "share" in name]
SECONDS = [name for name in NAMES if name.endswith("overhead_seconds")]


def test_a_broken_rates_file_is_one_line_and_no_more(run: Run, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "rates.json").write_text("{")
    ran = run("plan", "--model", "synthetic:tiny", "--json")
    assert ran.code == 0
    assert ran.err.startswith(f"{tmp_path}/cache/rates.json: is ignored")
    assert ran.err.count("\n") == 1


def test_sequences_take_a_cache_each_and_share_the_pass(run: Run) -> None:
    one, four = planned(run, *LLAMA_70B), planned(run, *LLAMA_70B, "--parallel", "4")
    assert four["plan"]["device_bill"]["kv_cache"] == 4 * one["plan"]["device_bill"]["kv_cache"]
    predicted = four["plan"]["predicted"]
    assert predicted["seconds_per_token"] == pytest.approx(predicted["seconds_per_pass"] / 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device-gbps", "1008"], "--device-memory is 0.9, a share of what is free; a device that is described needs a size"),
        (["--device-gbps", "1008", "--device-memory", "24GiB"], "--host-memory is 0.8, a share of what is free;"),
        (["--device-gbps", "1008", "--device", "cpu"], "--device is cpu, and --device-tflops or --device-gbps describe another"),
        (["--device-gbps", "0"], "--device-gbps is 0.0; it must be between 0.000001 and 1,000,000"),
        (["--disk-gbps", "nan"], "--disk-gbps is nan; it must be between"),
        (["--prompt-tokens", "0"], "--prompt-tokens is 0; it must be between 1 and 10,000,000"),
        (["--prompt-tokens", "5000"], "--prompt-tokens is 5000, the context has 2048 positions; give a larger --max-context"),
        (["--parallel", "0"], "--parallel is 0; it must be between 1 and 64"),
        (["--mode", "fast"], "--mode is fast; it must be one of full, sparse, sirius"),
        (["--model", "nonsense"], "'nonsense' is not a known model"),
        (["--device-memory", "1MB"], "device budget 976.57 KiB is too small"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, run: Run) -> None:
    ran = run("plan", "--model", "synthetic:tiny?width=512&heads=8", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {message}")
    assert ran.err.count("\n") == 1


def test_a_plan_that_does_not_fit_this_machine_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_host_nbytes", lambda: GIB + HOST_RESERVE_NBYTES)
    ran = run("plan", "--model", "synthetic:llama-3-8b", "--device", "cpu", "--device-memory", "20GiB")
    assert ran.code == 2
    assert "1.00 GiB" in ran.err or "MiB are free" in ran.err


def test_copies_for_drafts_are_among_the_candidates_and_what_is_assumed_of_their_rate_is_said(run: Run) -> None:
    asked = ["--model", "llama-3-70b", "--draft-quantize", "auto", "--device-memory", "24GiB", "--host-memory", "200GiB"]
    report = planned(run, *asked, "--link-gbps", "25", "--device-gbps", "1008")
    found = [(each["draft"], each["draft_quantize"]) for each in report["candidates"]]
    assert found == [("resident", "int4"), ("resident", "int8"), ("resident", "none"), ("streamed", "none")]
    assert report["plan"]["hot"]["draft_format"] == {"kind": "int4", "group": 32}
    assert report["plan"]["predicted"]["draft"]["nbytes"] == 0
    assert report["plan"]["predicted"]["correction"]["nbytes"] == 80 * report["plan"]["layer_nbytes"]
    assert report["quantized_rates"]["int4"]["bytes_per_second"] == 0.75 * 1008e9
    assert report["quantized_rates"]["int4"]["source"] == "assumed"
