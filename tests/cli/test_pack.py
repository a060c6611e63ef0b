"""`offload-sirius pack`: what it prints, and each wrong use in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload_sirius_loaders.pack_index import layer_file_name
from offload_sirius_loaders.packed import open_packed

from .conftest import Ran, Run

MODEL = "synthetic:tiny?dtype=F32"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "m"


def packed(run: Run, out: Path, *arguments: str) -> Ran:
    ran = run("pack", "--model", MODEL, "--out", str(out), *arguments)
    assert ran.code == 0, ran.err
    return ran


def test_a_line_says_what_was_written_and_the_copy_answers_as_the_model(run: Run, out: Path) -> None:
    assert packed(run, out, "--quantize", "int4").out.startswith(
        f"{out}: {MODEL}, 4 layers, float32, int4 in groups of 128, 440.50 KiB\n"
    )
    asked = ("--device", "cpu", "--threads", "1", "--mode", "full", "--prompt", "hello", "--max-new-tokens", "6", "--ignore-eos")
    copy, model = run("generate", "--model", str(out), *asked), run("generate", "--model", MODEL, "--quantize", "int4", *asked)
    assert copy.code == model.code == 0
    assert copy.out == model.out != ""


def test_a_plain_copy_has_no_group(run: Run, out: Path) -> None:
    assert f"{out}: {MODEL}, 4 layers, float32, " in packed(run, out).out
    assert "its matrices are not quantised" in run("pack", "--model", str(out), "--report").out


def test_the_report_has_a_line_for_each_layer(run: Run, out: Path) -> None:
    _, header, *lines = packed(run, out, "--quantize", "int8", "--report").out.splitlines()
    assert header.split() == ["layer", "q", "k", "v", "o", "gate", "up", "down", "largest"]
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    for line in lines:
        assert all(0 < float(share.rstrip("%")) < 1 for share in line.split()[1:-1])
    again = run("pack", "--model", str(out), "--report")
    assert again.out.splitlines()[1:] == [header, *lines], "it is kept in the copy"


def test_the_json_is_one_object_with_every_figure(run: Run, out: Path) -> None:
    ran = packed(run, out, "--quantize", "int4", "--quantize-group", "32", "--quantize-head", "int8", "--verify", "--json")
    found: dict[str, Any] = json.loads(ran.out)
    opened = open_packed(out, "m")
    assert ran.out.count("\n") == 1
    assert len(found["errors"]) == 4
    assert set(found.pop("errors")[0]["down"]) == {"largest", "relative_rms"}
    assert found == {
        "model": MODEL,
        "out": str(out),
        "dtype": "float32",
        "quantize": "int4",
        "quantize_group": 32,
        "quantize_head": "int8",
        "layers": 4,
        "bytes": sum(seal.nbytes for seal in opened.index.seals.values()),
        "verified_bytes": sum(file.data_nbytes for file in opened.files.values()),
    }


def test_verifying_says_that_all_is_well_or_what_is_not(run: Run, out: Path) -> None:
    packed(run, out)
    assert "every checksum is right, of " in run("pack", "--model", str(out), "--verify").out
    path = out / layer_file_name(1)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ran = run("pack", "--model", str(out), "--verify")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {out}: is damaged: layer-00001.safetensors: attention and records, bytes 4096 to ")


def test_ctrl_c_ends_quietly_and_the_same_command_goes_on(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("offload_sirius.engine.packing._Packer._write_layer", interrupt)
        ran = run("pack", "--model", MODEL, "--out", str(out))
    assert (ran.code, ran.out, ran.err) == (130, "", "")
    assert {path.name for path in out.iterdir()} == {"packing.json", "outside.safetensors"}
    packed(run, out)
    assert not (out / "packing.json").exists()


def test_packing_again_changes_nothing(run: Run, out: Path) -> None:
    first = packed(run, out).out
    assert packed(run, out).out == first


def test_a_plan_of_the_copy_takes_as_much_as_one_of_quantising_at_load(run: Run, out: Path) -> None:
    packed(run, out, "--quantize", "int4")
    asked = ("--mode", "full", "--device", "cpu", "--device-memory", "64MB", "--prompt-tokens", "8", "--json")
    copy = json.loads(run("plan", "--model", str(out), *asked).out)["plan"]
    model = json.loads(run("plan", "--model", MODEL, "--quantize", "int4", *asked).out)["plan"]
    assert copy["layer_nbytes"] == model["layer_nbytes"]
    assert copy["device_bill"] == model["device_bill"]
    assert copy["host_bill"]["quantising"] == 0 < model["host_bill"]["quantising"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--out is missing; give the folder to write, or --verify or --report with a --model that is packed"),
        (
            ("--verify",),
            "--model is synthetic:tiny?dtype=F32, which is not packed; give --out DIR to pack it, or the",
        ),
        (("--verify", "--quantize", "int8"), "--quantize is int8; it must be left out without --out, as nothing is written"),
        (("--report", "--dtype", "float32"), "--dtype is float32; it must be left out without --out, as nothing is written"),
        (("--out", "{out}", "--quantize", "int3"), "--quantize is int3; it must be one of none, int8, int4"),
        (("--out", "{out}/no/m"), "{out}/no/m: its parent folder does not exist; create it first"),
    ],
)
def test_wrong_use_is_one_line(arguments: tuple[str, ...], message: str, run: Run, out: Path) -> None:
    ran = run("pack", "--model", MODEL, *(each.format(out=out) for each in arguments))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("error: " + message.format(out=out))


def test_a_folder_that_is_not_finished_is_no_model(run: Run, out: Path) -> None:
    packed(run, out)
    (out / "pack.json").rename(out / "packing.json")
    ran = run("generate", "--model", str(out), "--prompt", "hello")
    assert (ran.code, ran.err) == (
        2,
        f"error: {out}: is a packed copy that was not finished; run the same `offload-sirius pack` again, which completes it\n",
    )
