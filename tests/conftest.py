"""What tests of several rooms share: small models with random weights, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.writer import write_checkpoint

torch.set_num_threads(2)

TINY = "synthetic:tiny?dtype=F32"


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
