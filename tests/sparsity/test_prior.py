"""What earlier runs say: sums that tokens add up to, and a file that never stops an answer."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from offload_sirius.sparsity.prior import MOST_TOKENS, PSEUDO_TOKENS, NeuronPrior, PriorFile, fingerprint, prior_path
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint

SPEC = open_checkpoint("synthetic:tiny?ffn=12&layers=2").spec
LAYERS, F = SPEC.num_layers, SPEC.ffn_width
CPU = torch.device("cpu")
ALL = torch.arange(F)


class Lines(list[str]):
    """What was warned of."""

    def one(self) -> str:
        [line] = self
        return line


def shares(num_tokens: int, seed: int = 0) -> Tensor:
    """What neurons say of so many tokens, each of which says 1 in all: float32 [F]."""
    drawn = torch.rand(num_tokens, F, generator=torch.Generator().manual_seed(seed))
    return (drawn / drawn.sum(dim=1, keepdim=True)).sum(dim=0)


def prior_in(folder: Path, lines: Lines | None = None) -> NeuronPrior:
    def warn(line: str) -> None:
        assert lines is not None, line
        lines.append(line)

    return NeuronPrior(PriorFile(folder / "priors" / "tiny.safetensors", warn), SPEC, device=CPU)


# What it says.


def test_a_model_that_nobody_ran_has_no_say(tmp_path: Path) -> None:
    assert prior_in(tmp_path).pseudo_scores(0).tolist() == [0] * F


@pytest.mark.parametrize("num_tokens", [1, PSEUDO_TOKENS - 1, PSEUDO_TOKENS, 1000])
def test_it_counts_for_some_tokens_like_those_before_and_for_no_more_than_there_were(num_tokens: int, tmp_path: Path) -> None:
    prior, said = prior_in(tmp_path), shares(num_tokens)
    prior.learn(1, ALL, said)
    found = prior.pseudo_scores(1)
    assert torch.allclose(found, said / num_tokens * min(num_tokens, PSEUDO_TOKENS), rtol=1e-4)
    assert prior.pseudo_scores(0).tolist() == [0] * F


def test_what_neurons_say_by_their_places_is_learnt_by_their_numbers(tmp_path: Path) -> None:
    prior, said = prior_in(tmp_path), shares(5)
    places = torch.randperm(F, generator=torch.Generator().manual_seed(3))
    prior.learn(0, places, said[places])
    assert torch.equal(prior.sums[0], said)


def test_what_was_learnt_is_there_in_the_next_run(tmp_path: Path) -> None:
    first = prior_in(tmp_path)
    for layer in range(LAYERS):
        first.learn(layer, ALL, shares(40, layer))
    first.keep()
    second = prior_in(tmp_path)
    assert torch.equal(second.sums, first.sums)
    assert second.sums.sum(dim=1).tolist() == pytest.approx([40, 40], rel=1e-4)


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(1, 3 * MOST_TOKENS), min_size=1, max_size=6))
def test_it_stays_able_to_change(counts: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    prior = prior_in(tmp_path_factory.mktemp("cache"))
    expected = 0.0
    for seed, count in enumerate(counts):
        mean = shares(20, seed) / 20
        prior.learn(0, ALL, mean * count)
        prior.keep()
        expected = min(expected + count, MOST_TOKENS)
        assert float(prior.sums[0].sum()) == pytest.approx(expected, rel=1e-3)
    new = torch.zeros(F)
    new[3] = MOST_TOKENS
    prior.learn(0, ALL, new)
    assert float(prior.pseudo_scores(0)[3]) > 0.45 * PSEUDO_TOKENS


def test_what_broken_weights_say_is_forgotten(tmp_path: Path) -> None:
    prior = prior_in(tmp_path)
    prior.learn(0, ALL, shares(5))
    prior.learn(1, ALL, torch.full((F,), float("nan")))
    prior.keep()
    assert float(prior.sums[0].sum()) == pytest.approx(5)
    assert prior.sums[1].tolist() == [0] * F
    assert torch.equal(prior_in(tmp_path).sums, prior.sums)


# Files that cannot be used.

GOOD = save({"sums": torch.ones(LAYERS, F)})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nonsense",
        GOOD[:-1],
        GOOD[:20],
        b"\xff" * 8 + GOOD[8:],
        save({"mean": torch.ones(LAYERS, F)}),
        save({"sums": torch.ones(LAYERS, F + 1)}),
        save({"sums": torch.ones(F)}),
        save({"sums": torch.ones(LAYERS, F, dtype=torch.float64)}),
        save({"sums": torch.full((LAYERS, F), float("nan"))}),
        save({"sums": torch.full((LAYERS, F), float("inf"))}),
        save({"sums": torch.full((LAYERS, F), 1e38)}),
        save({"sums": torch.full((LAYERS, F), -1.0)}),
    ],
    ids=range(13),
)
def test_a_file_that_holds_something_else_is_one_line_and_is_replaced(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "priors" / "tiny.safetensors"
    file.parent.mkdir()
    file.write_bytes(content)
    lines = Lines()
    prior = prior_in(tmp_path, lines)
    assert lines.one() == f"{file}: is ignored and will be replaced, it does not hold a prior of {SPEC.name}"
    assert prior.sums.tolist() == torch.zeros(LAYERS, F).tolist()
    prior.learn(0, ALL, shares(3))
    prior.keep()
    assert torch.equal(prior_in(tmp_path).sums, prior.sums)
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_cannot_be_made_is_one_line_before_anything_is_learnt(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines = Lines()
    prior = prior_in(tmp_path / "file", lines)
    assert lines.one() == (
        f"{tmp_path}/file/priors/tiny.safetensors: cannot be written: Not a directory; what this run learns of the model's "
        "neurons is not kept: set OFFLOAD_SIRIUS_CACHE to another folder, or give --no-prior"
    )
    prior.learn(0, ALL, shares(3))
    prior.keep()
    assert len(lines) == 1
    assert float(prior.pseudo_scores(0).sum()) == pytest.approx(3), "it is of use to this run"


def test_a_folder_in_the_file_s_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "priors" / "tiny.safetensors").mkdir(parents=True)
    lines = Lines()
    prior_in(tmp_path, lines).keep()
    assert "is a folder" in lines.one()


def test_a_disk_that_fills_up_is_one_line_and_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Lines()
    prior = prior_in(tmp_path, lines)
    prior.learn(0, ALL, shares(3))
    prior.keep()

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    kept = prior.sums.clone()
    for _ in range(2):
        prior.learn(0, ALL, shares(3))
        prior.keep()
    assert "cannot be written: No space left on device; what this run learns" in lines.one()
    assert torch.equal(prior_in(tmp_path).sums, kept)


def test_processes_that_write_at_once_leave_the_file_of_one_of_them(tmp_path: Path) -> None:
    priors = [prior_in(tmp_path) for _ in range(4)]
    for number, prior in enumerate(priors):
        prior.learn(0, ALL, shares(20, number))

    def write(prior: NeuronPrior) -> None:
        for _ in range(20):
            prior.keep()

    threads = [threading.Thread(target=write, args=(prior,)) for prior in priors]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        prior_in(tmp_path)  # a file that is half there would be warned of
    last = prior_in(tmp_path).sums
    assert any(torch.equal(last, prior.sums) for prior in priors)


# Whose it is.


def test_a_model_has_its_own_place_and_another_of_the_same_name_another(tiny: Checkpoint, tmp_path: Path) -> None:
    found = prior_path(tmp_path, tiny)
    assert found == prior_path(tmp_path, tiny)
    assert found.parent == tmp_path / "priors"
    assert found.name == f"tiny-{fingerprint(tiny)}.safetensors"
    prints = {
        fingerprint(open_checkpoint(f"synthetic:tiny?{parameters}"))
        for parameters in ("dtype=F32", "dtype=F32&seed=1", "dtype=BF16", "dtype=F32&ffn=12", "dtype=F32&layers=2")
    }
    assert len({*prints, fingerprint(tiny)}) == 6


def test_weights_that_were_trained_further_are_another_model(tiny_directory: Path, tiny: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in tiny_directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert fingerprint(open_checkpoint(str(folder))) == fingerprint(tiny)
    info = open_checkpoint(str(folder)).tensors[2, "gate"]
    assert info.file is not None
    with info.file.open("r+b") as file:
        file.seek(info.offset)
        file.write(b"\x00\x00\x80\x3f")
    assert fingerprint(open_checkpoint(str(folder))) != fingerprint(tiny)


@pytest.mark.parametrize("name", ["a/b", "x" * 300, "ä ö", ".."])
def test_any_name_is_a_file_s(name: str, tmp_path: Path, tiny: Checkpoint) -> None:
    tiny.spec = replace(tiny.spec, name=name)
    path = prior_path(tmp_path, tiny)
    assert path.parent == tmp_path / "priors"
    NeuronPrior(PriorFile(path, pytest.fail), SPEC, device=CPU).keep()
    assert path.exists()
