"""Rows of the embedding table, from memory and from disk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from offload_sirius.blocks import BLOCK_FORMATS
from offload_sirius.kernels.blocks import BlockRows
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.embedding import DiskEmbedding, Embedding, TableEmbedding
from offload_sirius_loaders.checkpoint import Checkpoint


def stay(rows: torch.Tensor) -> torch.Tensor:
    """What computes is the host."""
    return rows


@pytest.fixture
def table(tiny: Checkpoint) -> torch.Tensor:
    return torch.from_numpy(tiny.read(None, "embedding"))


@pytest.fixture(params=["memory", "disk"])
def embedding(request: pytest.FixtureRequest, tiny: Checkpoint, table: torch.Tensor) -> Iterator[Embedding]:
    readers = ReaderPool(tiny, 3)
    disk = DiskEmbedding(tiny.tensors[None, "embedding"], readers, torch.float32, stay)
    yield TableEmbedding(table, table.dtype, stay) if request.param == "memory" else disk
    readers.close()


@pytest.mark.parametrize("token_ids", [[5], [0, 511], [7, 7, 7], [3, 1, 2, 1, 3]])
@pytest.mark.parametrize("inference", [False, True])
def test_each_token_gets_its_row(embedding: Embedding, table: torch.Tensor, token_ids: list[int], inference: bool) -> None:
    with torch.inference_mode(inference):
        rows = embedding.rows(torch.tensor(token_ids))
        assert torch.equal(rows, table[token_ids])


def test_rows_of_blocks_become_numbers_as_they_are_gathered() -> None:
    form = BLOCK_FORMATS["Q8_0"]
    table = BlockRows(torch.randint(0, 60, (9, form.row_nbytes(64)), dtype=torch.uint8), 64, form)
    rows = TableEmbedding(table, torch.bfloat16, stay).rows(torch.tensor([8, 0, 8]))
    assert torch.equal(rows, table.dequantised()[[8, 0, 8]].bfloat16())


def test_numbers_of_tokens_go_to_a_table_that_is_not_on_the_host() -> None:
    """A table on a device without bytes stands for one: what it is asked with must have been sent."""
    table, sent = torch.empty(9, 4, device="meta"), list[torch.Tensor]()

    def send(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor)
        return tensor.to("meta")

    rows = TableEmbedding(table, table.dtype, send).rows(torch.tensor([1, 8]))
    assert [tensor.tolist() for tensor in sent] == [[1, 8]]
    assert (rows.device.type, rows.shape) == ("meta", (2, 4))
