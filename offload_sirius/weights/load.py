"""Everything that is read before the first token: residents, host layers, head, norm, embedding. In parallel, with progress.

Only the way in differs by device: host memory is read into directly; a device with memory of its own is filled through two
pinned host buffers of a layer's size, one being read into while the other is uploaded. Matrices that are to be quantised are read
into two places of the largest one's size, one being read into while the other is quantised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from offload_sirius.blocks import BlockFormat
from offload_sirius.kernels.blocks import BlockRows
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.quantization import WeightFormat
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.copiers import layer_jobs
from offload_sirius.weights.device import AnyDeviceStore, Head
from offload_sirius.weights.disk import Fill, Job, ReaderPool, tensor_jobs
from offload_sirius.weights.embedding import Table
from offload_sirius.weights.host import HostStore, allocate_bytes
from offload_sirius.weights.layout import PARTS
from offload_sirius.weights.pieces import Piece, head_role, largest_matrix_nbytes, pieces_of
from offload_sirius.weights.plan import NUM_QUANTISING, ROWS_QUANTISING_NBYTES, table_nbytes
from offload_sirius.weights.quant import quantise_rows
from offload_sirius_loaders.checkpoint import Checkpoint, TensorInfo
from offload_sirius_loaders.spec import Role

OnBytes = Callable[[int], None]

OnQuantised = Callable[[int, Role, Tensor, QuantizedRows], None]
"""Layer, role, the matrix [N, D] with a row for each of the quantised ones, and those."""


class Loader:
    """Fills host and device stores from a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        readers: ReaderPool,
        on_bytes: OnBytes,
        quantise_from: torch.dtype | None = None,
        on_quantised: OnQuantised | None = None,
    ) -> None:
        """on_bytes: called with the bytes of each piece that has been read, by the reader threads.

        quantise_from: the type in which matrices are read that are to be quantised; None where they are not, or are so already.
        on_quantised: is shown each of them beside what it was quantised to.
        """
        self._checkpoint = checkpoint
        self._readers = readers
        self._on_bytes = on_bytes
        self._quantiser = None if quantise_from is None else _Quantiser(self, checkpoint, quantise_from, on_quantised)

    def load_host_layers(self, store: HostStore, layers: Iterable[int]) -> None:
        """Fill the arena."""
        self._fill_layers((layer, store.layer(layer)) for layer in layers)

    def load_layer(self, layer: int, buffer: LayerBuffer) -> None:
        """Fill one layer in host memory."""
        self._fill_layers([(layer, buffer)])

    def load_device(self, device: AnyDeviceStore, staging: list[LayerBuffer]) -> None:
        """Fill head, final norm and residents. staging: host buffers to pass through; none where the device is the host."""
        tensors: dict[Role, Head] = {"final_norm": device.final_norm, head_role(self._checkpoint): device.head}
        for role, table in tensors.items():
            info = self.info(None, role)
            if isinstance(table, QuantizedRows) and info.element != "U8":
                for first, rows in self.quantised_batches(info, device.final_norm.dtype, table.form):
                    table.rows[first : first + len(rows)].copy_(rows)
                continue
            place = table if isinstance(table, Tensor) else table.rows  # stored as they are held
            if staging:
                self._upload_tensor(info, place, staging[0].storage)
            else:
                self.load_tensor(None, role, place)
        if staging:
            self._upload_layers(device.residents, staging)
        else:
            self._fill_layers(device.residents.items())

    def load_tensor(self, layer: int | None, role: Role, place: Tensor) -> None:
        """Fill one tensor in host memory."""
        self.begin_tensor(layer, role, place).wait()

    def begin_tensor(self, layer: int | None, role: Role, place: Tensor) -> Fill:
        """Begin to."""
        return self._readers.submit(tensor_jobs(self.info(layer, role), place), self._on_bytes)

    def info(self, layer: int | None, role: Role) -> TensorInfo:
        """Where a tensor is stored."""
        return self._checkpoint.tensors[layer, role]

    def load_embedding(self, dtype: torch.dtype, form: BlockFormat | None = None) -> Table:
        """The embedding table in host memory, in that type or in blocks."""
        spec = self._checkpoint.spec
        nbytes = table_nbytes(spec, dtype.itemsize, form)
        rows = allocate_bytes(nbytes, torch.device("cpu"), "host")
        held = rows.view(dtype if form is None else torch.uint8).view(spec.vocab_size, -1)
        self.load_tensor(None, "embedding", held)
        return held if form is None else BlockRows(held, spec.width, form)

    def _fill(self, layer: int, buffer: LayerBuffer) -> list[Fill]:
        return [self._readers.submit(layer_jobs(self._checkpoint, layer, part, buffer), self._on_bytes) for part in PARTS]

    def _fill_layers(self, layers: Iterable[tuple[int, LayerBuffer]]) -> None:
        if self._quantiser is not None:
            self._quantiser.fill_layers(layers)
            return
        # All at once: the readers' queue never runs dry between two layers.
        for fill in [fill for layer, buffer in layers for fill in self._fill(layer, buffer)]:
            fill.wait()

    def _upload_layers(self, residents: dict[int, LayerBuffer], staging: list[LayerBuffer]) -> None:
        if self._quantiser is not None:
            for layer, resident in residents.items():
                self._quantiser.fill_layers([(layer, staging[0])])
                resident.storage.copy_(staging[0].storage)
            return
        layers = list(residents)
        fills = {layer: self._fill(layer, buffer.of_layer(layer)) for layer, buffer in zip(layers, staging, strict=False)}
        for index, layer in enumerate(layers):
            for fill in fills.pop(layer):
                fill.wait()
            buffer = staging[index % len(staging)]
            residents[layer].storage.copy_(buffer.of_layer(layer).storage)
            if (following := index + len(staging)) < len(layers):
                fills[layers[following]] = self._fill(layers[following], buffer.of_layer(layers[following]))

    def _upload_tensor(self, info: TensorInfo, place: Tensor, staging: Tensor) -> None:
        """Fill a tensor on a device, as many rows at a time as the staging buffer, uint8 [n], has room for."""
        rows = place.view(info.num_rows, -1)
        for first, host in self.row_batches(info, place.dtype, staging):
            rows[first : first + len(host)].copy_(host)

    def quantised_batches(self, info: TensorInfo, dtype: torch.dtype, form: WeightFormat) -> Iterator[tuple[int, Tensor]]:
        """A matrix that is read in a type, quantised some rows at a time: first row, uint8 [r, row_nbytes] in host memory."""
        width = info.shape[-1]
        row_nbytes = width * dtype.itemsize
        num_rows = max(1, ROWS_QUANTISING_NBYTES // (row_nbytes + form.row_nbytes(width)))
        staging = allocate_bytes(num_rows * row_nbytes, torch.device("cpu"), "host")
        for first, host in self.row_batches(info, dtype, staging):
            yield first, quantise_rows(host, form)

    def row_batches(self, info: TensorInfo, dtype: torch.dtype, staging: Tensor) -> Iterator[tuple[int, Tensor]]:
        """A tensor in host memory, as many rows at a time as the staging buffer, uint8 [n], has room for: first row, [r, C]."""
        row_nbytes = info.stored_shape[-1] * dtype.itemsize
        for batch in _batches(pieces_of(info), staging.numel() // row_nbytes):
            first, num_rows = batch[0].first_row, sum(piece.num_rows for piece in batch)
            fits = num_rows * row_nbytes <= staging.numel()  # a layer of a small model may be smaller than one piece
            flat = staging[: num_rows * row_nbytes] if fits else torch.empty(num_rows * row_nbytes, dtype=torch.uint8)
            host = flat.view(dtype).view(num_rows, -1)
            self._readers.submit([Job(piece, host, piece.first_row - first) for piece in batch], self._on_bytes).wait()
            yield first, host


class _Waiting(NamedTuple):
    """A matrix that is being read to be quantised."""

    layer: int
    role: Role
    fill: Fill
    storage: Tensor
    matrix: Tensor
    place: QuantizedRows


class _Quantiser:
    """Fills layers whose matrices are quantised, tensor by tensor."""

    def __init__(self, loader: Loader, checkpoint: Checkpoint, dtype: torch.dtype, on_quantised: OnQuantised | None) -> None:
        self._loader = loader
        self._on_quantised = on_quantised
        self._spec = checkpoint.spec
        self._dtype = dtype
        nbytes = largest_matrix_nbytes(checkpoint.spec, dtype.itemsize)
        self._free = [allocate_bytes(nbytes, torch.device("cpu"), "host") for _ in range(NUM_QUANTISING)]
        self._waiting: deque[_Waiting] = deque()

    def fill_layers(self, layers: Iterable[tuple[int, LayerBuffer]]) -> None:
        """One matrix is read while the one before is quantised."""
        plain: list[Fill] = []
        for layer, buffer in layers:
            for role in self._spec.layer_roles():
                place = buffer.role(role)
                if isinstance(place, Tensor):
                    plain.append(self._loader.begin_tensor(layer, role, place))
                else:
                    assert isinstance(place, QuantizedRows), role
                    self._begin(layer, role, place)
        while self._waiting:
            self._finish_first()
        for fill in plain:
            fill.wait()

    def _begin(self, layer: int, role: Role, place: QuantizedRows) -> None:
        if not self._free:
            self._finish_first()
        storage = self._free.pop()
        nbytes = len(place) * place.width * self._dtype.itemsize
        matrix = storage[:nbytes].view(self._dtype).view(len(place), place.width)
        fill = self._loader.begin_tensor(layer, role, matrix.t() if role == "down" else matrix)
        self._waiting.append(_Waiting(layer, role, fill, storage, matrix, place))

    def _finish_first(self) -> None:
        waiting = self._waiting.popleft()
        waiting.fill.wait()
        quantise_rows(waiting.matrix, waiting.place.form, waiting.place.rows)
        if self._on_quantised is not None:
            self._on_quantised(waiting.layer, waiting.role, waiting.matrix, waiting.place)
        self._free.append(waiting.storage)


def _batches(pieces: list[Piece], max_rows: int) -> Iterator[list[Piece]]:
    """Neighbouring pieces of at most max_rows together; at least one each."""
    batch: list[Piece] = []
    for piece in pieces:
        if batch and piece.first_row + piece.num_rows - batch[0].first_row > max_rows:
            yield batch
            batch = []
        batch.append(piece)
    yield batch
