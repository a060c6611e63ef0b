"""`offload-sirius bench`: tables for people, one object for programs, pictures, traces; and what is refused before it begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offload_sirius.units import KIB

from .conftest import TINY, Ran, Run

STREAM = ("bench", "stream", *TINY, "--passes", "2")


@pytest.fixture
def link(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `bench link` on small buffers and a small file, each figure measured once."""
    for module in ("ways", "link"):
        monkeypatch.setattr(f"offload_sirius.bench.{module}.WALK_NBYTES", 128 * KIB)
    file = tmp_path / "weights"
    file.write_bytes(bytes(50_000))
    small = ("--device", "cpu", "--path", str(file), "--repeats", "1")
    return lambda *arguments: run("bench", "link", *small, *arguments)


def the_object(ran: Ran) -> dict[str, object]:
    """All there is on stdout."""
    assert (ran.code, ran.out.count("\n")) == (0, 1)
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def test_link_json_is_one_object_with_every_kind_of_rate(link: Run) -> None:
    found = the_object(link("--sizes", "64KiB,96KiB", "--json"))
    assert set(found) == {"device", "copies", "disk", "gathers"}
    copies = found["copies"]
    assert isinstance(copies, list)
    assert {copy["nbytes"] for copy in copies} == {64 * KIB, 96 * KIB}
    assert set(copies[0]["bytes_per_second"]) == {"median", "lowest", "highest"}


def test_people_get_a_line_for_each_rate(link: Run) -> None:
    lines = link("--sizes", "64KiB").out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [head.split(",")[0] for head in heads] == ["copies", "disk", "neuron records gathered out of host memory"]
    assert all(" GB/s  (" in line for line in lines if line.startswith(" "))


def test_sizes_for_which_there_is_no_memory_are_told(link: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offload_sirius.machine.free_host_nbytes", lambda: 600 * KIB)
    ran = link("--sizes", "64KiB,1MiB", "--json")
    assert ran.err == "no room to measure copies of 1.00 MiB\n"
    assert the_object(ran)


def test_a_model_of_which_every_layer_is_streamed_is_measured(run: Run) -> None:
    ran = run(*STREAM, "--link-gbps", "0.1")
    assert ran.code == 0
    assert "synthetic:tiny?dtype=F32 on cpu, 2 slots: 0.001 GB a pass over the link" in ran.out
    assert "at 0.10 GB/s, the emulated link's rate" in ran.out
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == ["pass", "ceiling", "link", "waited"]


def test_stream_writes_trace_and_picture_beside_its_one_object(run: Run, tmp_path: Path) -> None:
    trace, picture = tmp_path / "trace.json", tmp_path / "stream.png"
    found = the_object(run(*STREAM, "--json", "--link-gbps", "0.5", "--trace", str(trace), "--plot", str(picture)))
    assert found["bound"] == "the emulated link's rate"
    rows = {event["cat"] for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"}
    assert rows == {"copy", "compute", "wait", "sample"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_link_draws_a_picture(link: Run, tmp_path: Path) -> None:
    assert link("--sizes", "64KiB", "--plot", str(tmp_path / "link.png")).code == 0
    assert (tmp_path / "link.png").read_bytes().startswith(b"\x89PNG")


def test_verbose_says_where_the_layers_are(run: Run) -> None:
    assert "layers: 0 resident, 4 streamed from host memory" in run(*STREAM, "--verbose").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench"], "Missing command."),
        (["bench", "link", "--repeats", "0"], "--repeats is 0; it must be at least 1"),
        (["bench", "link", "--device", "tpu"], "--device is tpu; it must be auto, cuda, cuda:N or cpu"),
        (["bench", "link", "--sizes", "1MiB,0.5"], "--sizes: '0.5' is a share; give sizes such as 1MiB,64MiB"),
        (
            ["bench", "link", "--sizes", "1MiB,much"],
            "size 'much' is not understood; write 24GiB, 500MB, or a share of what is free such as 0.8",
        ),
        (["bench", "stream", "--passes", "0"], "--passes is 0; it must be at least 1"),
        (
            [*STREAM, "--device-memory", "1GiB"],
            "all 4 layers of synthetic:tiny?dtype=F32 would be resident, and nothing to measure; "
            "leave out --device-memory, or give a model with more layers",
        ),
        (
            [*STREAM, "--trace", "/nowhere/trace.json"],
            "--trace /nowhere/trace.json: cannot be written: No such file or directory; "
            "name a file in a folder that can be written to",
        ),
        (
            [*STREAM, "--plot", "/nowhere/stream.png"],
            "--plot /nowhere/stream.png: cannot be written: No such file or directory; "
            "name a file in a folder that can be written to",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], message: str, run: Run) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out, ran.err) == (2, "", f"error: {message}\n")


def test_a_cache_folder_that_cannot_be_made_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(file / "cache"))
    ran = run("bench", "link", "--device", "cpu")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"error: {file}/cache: cannot be made: Not a directory; set OFFLOAD_SIRIUS_CACHE, or name a folder with --path\n"
    )
