"""Ctrl-C and SIGTERM at any moment: the command ends, says so by its exit code, and leaves nothing half written or running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_sirius.cli import main
from offload_sirius_loaders import CheckpointError, open_checkpoint

TINY = "synthetic:tiny?dtype=F32"
SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
STREAMED = ("--device-memory", "900KiB", "--host-memory", "64MiB")
GENERATE = (
    "generate",
    "--model",
    TINY,
    "--prompt",
    "hi",
    "--max-new-tokens",
    "8",
    "--device",
    "cpu",
    "--threads",
    "1",
    *STREAMED,
)
Capture = pytest.CaptureFixture[str]

MOMENTS = {
    "opening": ("offload_sirius.engine.opened", "load_tokenizer", 1),
    "planning": ("offload_sirius.engine.building", "place", 1),
    "loading": ("offload_sirius.engine.building", "Loader.load_device", 1),
    "allocating": ("offload_sirius.engine.building", "KVCache", 1),
    "prefill": ("offload_sirius.weights.streamer", "WeightStreamer.neurons", 2),
    "drafting": ("offload_sirius.weights.copiers", "HostCopier.start", 30),
    "decoding": ("offload_sirius.model.transformer", "Transformer.step_all", 4),
    "writing": ("offload_sirius.cli.console", "TextWriter.write", 3),
}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert [each.name for each in threading.enumerate() if each.name.startswith(("reader", "placer", "copier"))] == []
    assert signal.getsignal(signal.SIGTERM) is before


def signal_at(number: int, monkeypatch: pytest.MonkeyPatch, module: str, name: str, moment: int) -> Callable[[], int]:
    """Send it in front of the call of that number; what is returned says how many there were."""
    holder: Any = sys.modules[module] if module in sys.modules else __import__(module, fromlist=["x"])
    *path, last = name.split(".")
    for each in path:
        holder = getattr(holder, each)
    call, count = getattr(holder, last), 0

    def watched(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), number)
        return call(*arguments, **named)

    monkeypatch.setattr(holder, last, watched)
    return lambda: count


@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("module", "name", "moment"), MOMENTS.values(), ids=MOMENTS)
def test_a_signal_ends_an_answer_with_its_code_and_without_a_traceback(
    module: str, name: str, moment: int, number: int, code: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = signal_at(number, monkeypatch, module, name, moment)
    assert main(GENERATE) == code
    assert calls() >= moment
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "error" not in captured.err
    assert captured.out == "" or captured.out.endswith("\n")


PACKING = {
    "the marker": ("offload_sirius_loaders.pack_writer", "marker_text", 1),
    "the first file": ("offload_sirius_loaders.pack_file", "_Checksums.add", 1),
    "a layer": ("offload_sirius_loaders.pack_file", "_Checksums.add", 8),
    "a rename": ("offload_sirius_loaders.pack_file", "replace_file", 3),
    "the index": ("offload_sirius_loaders.pack_writer", "write_small_file", 3),
}


@pytest.mark.parametrize(("number", "code"), SIGNALS, ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(("module", "name", "moment"), PACKING.values(), ids=PACKING)
def test_a_signal_while_packing_leaves_no_half_file_and_the_same_command_goes_on(
    module: str, name: str, moment: int, number: int, code: int, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["pack", "--model", TINY, "--out", str(tmp_path / "m")]
    with monkeypatch.context() as patched:
        calls = signal_at(number, patched, module, name, moment)
        assert main(command) == code
    assert calls() >= moment
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.partial*"))
    with pytest.raises(CheckpointError):
        open_checkpoint(str(tmp_path / "m"))
    assert main(command) == 0
    assert main(["pack", "--model", str(tmp_path / "m"), "--verify"]) == 0


def test_a_second_sigterm_ends_a_command_that_does_not_end() -> None:
    program = (
        "import os, signal, time; from offload_sirius.cli import app\n"
        "def stubborn(arguments):\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "    except KeyboardInterrupt: os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
        "app._run = stubborn; app.main([])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")
