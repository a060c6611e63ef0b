"""Packing: a copy of a model whose layers are stored as they are held in memory, quantised where that is asked for.

Joins the parts that load a model with those that write one. The bytes of a layer are those of a LayerBuffer, filled as it is
when the model itself is loaded: so a packed copy gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload_sirius.config import EngineConfig
from offload_sirius.engine.placement import DTYPES
from offload_sirius.engine.planning import as_held, dtype_of, field_places, free_host_nbytes, head_format_of, held_layout
from offload_sirius.engine.progress import Progress
from offload_sirius.errors import BudgetError, CheckpointError, ConfigError
from offload_sirius.kernels.packed import QuantizedRows
from offload_sirius.machine import physical_cores
from offload_sirius.quantization import WeightFormat
from offload_sirius.units import format_size
from offload_sirius.weights.buffers import LayerBuffer
from offload_sirius.weights.disk import ReaderPool
from offload_sirius.weights.host import allocate_bytes
from offload_sirius.weights.layout import PARTS, LayerLayout
from offload_sirius.weights.load import Loader
from offload_sirius.weights.pieces import (
    PIECE_NBYTES,
    blocks_by_layer,
    blocks_of,
    head_role,
    quantising_nbytes,
    read_nbytes,
    reading_cost,
    stored_part_nbytes,
)
from offload_sirius.weights.plan import MIN_READERS, ROWS_QUANTISING_NBYTES
from offload_sirius.weights.quant import QuantizationError, quantization_error
from offload_sirius_loaders import open_checkpoint
from offload_sirius_loaders.checkpoint import Checkpoint
from offload_sirius_loaders.pack_file import damaged_pieces
from offload_sirius_loaders.pack_index import OUTSIDE_NAME, PackJob, layer_file_name
from offload_sirius_loaders.pack_writer import PackWriter
from offload_sirius_loaders.packed import ERRORS_NOTE, PackedCheckpoint
from offload_sirius_loaders.spec import Role

FINGERPRINT_NBYTES = 4096
"""Bytes of each tensor that tell one model from another of the same name."""

READERS_SHARE = 4
"""Readers take this part of free host memory at most: the pages of what is written want some, too."""


NUM_NAMED = 3
"""Damaged pieces that one line names."""


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What a packed copy came to."""

    directory: Path
    source: str
    """The model that it is a copy of."""
    dtype: str
    quantize: str
    quantize_group: int | None
    quantize_head: str
    num_layers: int
    nbytes: int
    """Of all its files."""
    errors: tuple[dict[str, QuantizationError], ...]
    """Of each layer, role of a matrix -> what quantising did to it. Empty where nothing is quantised."""


def pack(config: EngineConfig, directory: Path, progress: Progress) -> None:
    """Write a packed copy, or what is missing of one. config: model, dtype and how to quantise are taken from it.

    Raises CheckpointError where the folder cannot be written, ConfigError, BudgetError.
    """
    checkpoint = open_checkpoint(config.model)
    if checkpoint.packed is not None:
        raise ConfigError(f"{config.model}: is packed already; give the model that it was made from, or leave --out out")
    held, dtype, form = as_held(checkpoint, config), dtype_of(config, checkpoint.spec), config.weight_format
    head_format_of(held, config)
    layout, outside = held_layout(held, config), {role: held.tensors[None, role] for role in blocks_of(held, None)}
    blocks: list[dict[str, str]] = [{role: each.name for role, each in blocks.items()} for blocks in blocks_by_layer(held)]
    job = PackJob(
        source=checkpoint.spec.name,
        fingerprint=source_fingerprint(checkpoint),
        dtype=dtype,
        quantize=config.quantize,
        quantize_group=None if form is None else form.group,
        fields=field_places(layout),
        attention_nbytes=layout.attention_nbytes,
        records_nbytes=layout.records_nbytes,
        blocks=tuple(blocks) if any(blocks) else (),
        sizes=tuple((own.attention_nbytes, own.records_nbytes) for own in layout.by_layer),
        outside_blocks={role: (info.dtype, info.row_nbytes) for role, info in outside.items()},
        quantize_head=config.quantize_head,
        head_row_nbytes=0 if config.head_format is None else config.head_format.row_nbytes(checkpoint.spec.width),
    )
    with ExitStack() as opened:
        opened.callback(checkpoint.close)
        writer = PackWriter(directory, job, checkpoint)
        opened.callback(writer.close)
        _resume(writer, job.source, progress)
        if writer.missing:
            _Packer(held, layout, config.head_format, DTYPES[dtype], writer, progress).run()
        writer.finish()


def report_of(model: str) -> PackReport:
    """What is known of a packed copy. Raises ConfigError where the model is not packed, CheckpointError."""
    checkpoint = open_packed_copy(model)
    job, layers = checkpoint.index.job, range(checkpoint.spec.num_layers)
    errors = [{role: QuantizationError(**found) for role, found in checkpoint.errors(layer).items()} for layer in layers]
    assert checkpoint.path is not None
    return PackReport(
        directory=checkpoint.path,
        source=job.source,
        dtype=job.dtype,
        quantize=job.quantize,
        quantize_group=job.quantize_group,
        quantize_head=job.quantize_head,
        num_layers=len(layers),
        nbytes=sum(seal.nbytes for seal in checkpoint.index.seals.values()),
        errors=tuple(errors) if job.quantize != "none" else (),
    )


def verify_copy(model: str, progress: Progress) -> int:
    """Read all of a packed copy and compare every checksum; returns the bytes. Raises CheckpointError, naming what is damaged."""
    checkpoint = open_packed_copy(model)
    files = list(checkpoint.files.values())
    nbytes = sum(file.data_nbytes for file in files)
    progress.begin(f"verifying {checkpoint.spec.name}", nbytes)
    try:
        damaged = [file.damage(index) for file, index in damaged_pieces(files, progress.advance)]
    finally:
        progress.end()
    if damaged:
        num_more = len(damaged) - NUM_NAMED
        more = f"; and {num_more} more" if num_more > 0 else ""
        raise CheckpointError(
            f"{checkpoint.path}: is damaged: {'; '.join(damaged[:NUM_NAMED])}{more}; "
            "remove the files that are named and pack the model again"
        )
    return nbytes


def open_packed_copy(model: str) -> PackedCheckpoint:
    """Open a model that must be packed. Raises ConfigError where it is not, CheckpointError."""
    checkpoint = open_checkpoint(model)
    if not isinstance(checkpoint, PackedCheckpoint):
        raise ConfigError(f"--model is {model}, which is not packed; give --out DIR to pack it, or the folder of a packed model")
    return checkpoint


def source_fingerprint(checkpoint: Checkpoint) -> str:
    """32 digits, of the model's shape, of what is stored of it, and of the first bytes of every tensor."""
    digest = hashlib.sha256(repr(checkpoint.spec).encode())
    for key, info in checkpoint.tensors.items():
        digest.update(repr((key, info.dtype, info.shape, info.nbytes)).encode())
        if info.file is not None:
            digest.update(np.fromfile(info.file, np.uint8, min(info.nbytes, FINGERPRINT_NBYTES), offset=info.offset).tobytes())
    return digest.hexdigest()[:32]


def _resume(writer: PackWriter, name: str, progress: Progress) -> None:
    if writer.unchecked_nbytes:
        progress.begin(f"checking what there is of {name}", writer.unchecked_nbytes)
    try:
        writer.resume(progress.advance)
    finally:
        progress.end()


class _Packer:
    """Fills one layer after the other and hands it to the writer."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: LayerLayout,
        head_format: WeightFormat | None,
        dtype: torch.dtype,
        writer: PackWriter,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._layout = layout
        self._head_format = head_format
        self._dtype = dtype
        self._writer = writer
        self._progress = progress
        self._errors: dict[str, QuantizationError] = {}

    def run(self) -> None:
        """Write what is missing."""
        spec, missing = self._checkpoint.spec, self._writer.missing
        readers = ReaderPool(self._checkpoint, self._num_readers())
        self._progress.begin(f"packing {spec.name}", sum(self._stored_nbytes(name) for name in missing))
        try:
            quantises = self._layout.format is not None
            loader = Loader(
                self._checkpoint,
                readers,
                self._progress.advance,
                quantise_from=self._dtype if quantises else None,
                on_quantised=self._measure,
            )
            buffer = LayerBuffer(
                allocate_bytes(self._layout.nbytes, torch.device("cpu"), "host"), spec, self._layout, self._dtype
            )
            if OUTSIDE_NAME in missing:
                self._writer.write(OUTSIDE_NAME, [_chunks(rows) for rows in self._outside(loader, buffer.storage)])
            for layer in range(spec.num_layers):
                if layer_file_name(layer) in missing:
                    # What lies between two tensors of a layer is never written: the same layers are to be the same bytes.
                    buffer.storage.zero_()
                    self._write_layer(loader, layer, buffer.of_layer(layer))
        finally:
            self._progress.end()
            readers.close()

    def _outside(self, loader: Loader, staging: Tensor) -> list[Iterator[tuple[int, Tensor]]]:
        """Rows of what no layer has, in the order in which it is written: a quantised head is the last."""
        checkpoint, form = self._checkpoint, self._head_format
        as_stored = [role for role in checkpoint.spec.model_roles() if form is None or role != "head"]
        infos = [checkpoint.tensors[None, role] for role in as_stored]
        dtypes = [torch.uint8 if info.element == "U8" else self._dtype for info in infos]  # blocks are bytes
        rows = [loader.row_batches(info, dtype, staging) for info, dtype in zip(infos, dtypes, strict=True)]
        if form is not None:
            rows.append(loader.quantised_batches(checkpoint.tensors[None, head_role(checkpoint)], self._dtype, form))
        return rows

    def _write_layer(self, loader: Loader, layer: int, buffer: LayerBuffer) -> None:
        self._errors = {}
        loader.load_layer(layer, buffer)
        notes = {role: asdict(error) for role, error in self._errors.items()}
        contents = [[_bytes_of(buffer.parts[part])] for part in PARTS]
        self._writer.write(layer_file_name(layer), contents, {ERRORS_NOTE: json.dumps(notes)} if notes else None)

    def _measure(self, layer: int, role: Role, matrix: Tensor, rows: QuantizedRows) -> None:
        self._errors[role] = quantization_error(matrix, rows.rows, rows.form)

    def _stored_nbytes(self, name: str) -> int:
        """Bytes that are read for a file."""
        if name == OUTSIDE_NAME:
            return sum(read_nbytes(self._checkpoint.tensors[None, role]) for role in self._checkpoint.spec.model_roles())
        layer = next(each for each in range(self._checkpoint.spec.num_layers) if layer_file_name(each) == name)
        return sum(stored_part_nbytes(self._checkpoint, layer, part) for part in PARTS)

    def _num_readers(self) -> int:
        """As many as there is room for. Raises BudgetError where it is too little for the least.

        needed = what reading takes + a layer + what is read before it is quantised
        """
        reading, free_nbytes = reading_cost(self._checkpoint, physical_cores()), free_host_nbytes()
        quantising = quantising_nbytes(self._checkpoint.spec, self._dtype.itemsize) if self._layout.format else 0
        head = 0 if self._head_format is None else ROWS_QUANTISING_NBYTES
        fixed_nbytes = max(self._layout.nbytes, PIECE_NBYTES) + quantising + head
        needed_nbytes = reading.nbytes(MIN_READERS) + fixed_nbytes
        if free_nbytes < needed_nbytes:
            raise BudgetError(
                f"host memory: packing {self._checkpoint.spec.name} takes {format_size(needed_nbytes)}, "
                f"{format_size(free_nbytes)} are free; free some"
            )
        room_nbytes = min(free_nbytes - fixed_nbytes, free_nbytes // READERS_SHARE)
        return reading.num_readers(room_nbytes)


def _chunks(batches: Iterator[tuple[int, Tensor]]) -> Iterator[memoryview]:
    for _, rows in batches:
        yield _bytes_of(rows)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
