"""Joining the rooms: what `load` accepts, what a failure leaves behind, and synthetic weights that are put on the disk."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

import offload_sirius
from offload_sirius.config import DecodingConfig, EngineConfig, names_of
from offload_sirius.engine import NoProgress
from offload_sirius.errors import BudgetError, CheckpointError, ConfigError
from offload_sirius_loaders import open_checkpoint, writer

from .conftest import TINY, Budgets, Load


class WatchedProgress(NoProgress):
    """Writes down what it was told."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.nbytes: list[int] = []
        self.num_ended = 0
        self._lock = threading.Lock()

    def begin(self, what: str, total_nbytes: int) -> None:
        self.begun.append((what, total_nbytes))
        self.nbytes.append(0)

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.nbytes[-1] += nbytes

    def end(self) -> None:
        self.num_ended += 1


def threads_of_ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "copier"))]


def written(cache: Path) -> list[str]:
    """Everything below the folder of synthetic weights, hidden files too."""
    return sorted(str(path.relative_to(cache / "synthetic")) for path in (cache / "synthetic").rglob("*"))


def test_the_model_is_named_by_position_or_by_word(load: Load) -> None:
    with offload_sirius.load(model=TINY, device="cpu", threads=1) as engine:
        assert engine.spec.name == load(TINY).spec.name == TINY


def test_without_a_context_the_default_one_is_planned_for_or_all_the_model_has(load: Load) -> None:
    for positions, context in ((100, 100), (8192, 4096)):
        engine = load(f"synthetic:tiny?positions={positions}", max_context=None)
        assert engine.generate("hi", max_new_tokens=1).plan["context"] == context


def test_a_setting_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        offload_sirius.load(TINY, device_ram="20GiB")
    known = sorted((names_of(EngineConfig) | names_of(DecodingConfig)) - {"decoding"})
    assert str(caught.value) == "unknown setting device_ram; known are " + ", ".join(known)


def test_a_model_longer_than_its_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--max-context is 4096; .* has 2048 positions"):
        offload_sirius.load(TINY, max_context=4096)


@pytest.mark.parametrize("where", ["resident", "host", "disk", "disk with the embedding"])
def test_progress_is_told_of_all_that_is_loaded(where: str, load: Load, budgets: Budgets) -> None:
    progress = WatchedProgress()
    load(progress=progress, **budgets(where))
    what, total_nbytes = progress.begun[-1]
    assert what.startswith("loading synthetic")
    assert progress.nbytes[-1] == total_nbytes > 0
    assert progress.num_ended == len(progress.begun)


@pytest.mark.parametrize("place", ["make_arenas", "DeviceStore", "Loader", "make_link", "WeightStreamer", "KVCache"])
def test_a_load_that_fails_half_way_leaves_no_threads(
    place: str, load: Load, budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(f"offload_sirius.engine.building.{place}", fail)
    with pytest.raises(BudgetError, match=r"memory ran out; the plan takes .*: give smaller --device-memory or --host-memory"):
        load(**budgets("host and disk"))
    assert threads_of_ours() == []


def test_a_load_that_is_interrupted_leaves_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offload_sirius.engine.building.Loader.load_device", interrupt)
    progress = WatchedProgress()
    with pytest.raises(KeyboardInterrupt):
        offload_sirius.load(TINY, device="cpu", threads=1, progress=progress)
    assert threads_of_ours() == []
    assert progress.num_ended == 1


def test_synthetic_weights_that_fit_into_memory_are_not_written(load: Load, budgets: Budgets, cache: Path) -> None:
    load(**budgets("host")).generate("hi", max_new_tokens=2)
    assert not cache.exists()


def test_synthetic_weights_that_exceed_memory_are_written_once_and_used_again(
    load: Load, budgets: Budgets, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(**budgets("disk"))
    [folder] = (cache / "synthetic").iterdir()
    on_disk, computed = open_checkpoint(str(folder)), open_checkpoint(TINY)
    for key in computed.tensors:
        assert (on_disk.read(*key) == computed.read(*key)).all()
    monkeypatch.setattr("offload_sirius.engine.building.write_checkpoint", lambda *_, **__: pytest.fail("written again"))
    load(**budgets("disk"))


def test_writing_synthetic_weights_is_told_as_progress(load: Load, budgets: Budgets) -> None:
    progress = WatchedProgress()
    load(progress=progress, **budgets("disk"))
    (what, total_nbytes), _ = progress.begun
    assert what.startswith(f"writing {TINY} to ")
    assert progress.nbytes[0] == total_nbytes
    assert progress.num_ended == 2


def test_models_of_another_seed_or_shape_have_folders_of_their_own(load: Load, budgets: Budgets, cache: Path) -> None:
    for model in (TINY, TINY + "&seed=1", TINY + "&seed=2"):
        load(model, **budgets("disk"))
    assert len(list((cache / "synthetic").iterdir())) == 3


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_nothing_half_written_remains_where_writing_breaks_off(
    error: BaseException, load: Load, budgets: Budgets, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(writer, "_flush", fail)
        expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
        with pytest.raises(expected) as caught:
            load(**budgets("disk"))
    assert written(cache) == []
    if expected is CheckpointError:
        assert str(caught.value).endswith(": cannot be written: No space left on device; nothing was left behind")
    load(**budgets("disk"))  # and the next attempt is not in its way


def test_a_cache_folder_that_cannot_be_made_is_named(
    load: Load, budgets: Budgets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("OFFLOAD_SIRIUS_CACHE", str(file / "cache"))
    with pytest.raises(ConfigError) as caught:
        load(**budgets("disk"))
    assert str(caught.value) == (
        f"{file}/cache/synthetic: cannot be made: Not a directory; set OFFLOAD_SIRIUS_CACHE to a folder that can be written to"
    )


def test_layers_of_a_shape_that_exceeds_memory_may_share_host_buffers(load: Load, budgets: Budgets) -> None:
    alone, shared = load(**budgets("host")), load(shared_host_buffers=1, **budgets("host and disk"))
    assert len(shared.plan.host_layers) == 4
    assert 4 * shared.plan.host_bill["layers"] == alone.plan.host_bill["layers"]
    result = shared.generate("hi", max_new_tokens=3, ignore_eos=True)
    assert result.link.bytes.full == 2 * alone.plan.pass_nbytes
