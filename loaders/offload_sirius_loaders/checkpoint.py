"""A checkpoint as the rest of the program sees it: a ModelSpec, where each tensor's bytes lie, and how to read them.

Nothing is copied or kept: `TensorInfo` says which bytes of which file, the caller reads them the way it likes (directly, in
pieces, many at a time) and `Checkpoint.decode` turns the bytes into numbers. Knows no file format; those are its subclasses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.spec import ModelSpec, Role

Element = Literal["F32", "F16", "BF16"]
"""What `decode` returns: float32, float16, or bfloat16 carried in uint16 (numpy has no bfloat16)."""

Key = tuple[int | None, Role]
"""(layer, role); the layer of embedding, head and final norm is None."""

NUMPY_OF_ELEMENT: dict[Element, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor: what it is and where its bytes are. A matrix is stored row after row: any range of rows is one of bytes."""

    name: str
    """Name in the file."""
    dtype: str
    """Storage type: F32, F16, BF16, or a GGUF block type such as Q4_1."""
    element: Element
    """Type of the numbers after decoding."""
    shape: tuple[int, ...]
    """[rows, columns] or [elements]"""
    file: Path | None
    """None: nothing is stored, `decode` computes the values (synthetic weights)."""
    offset: int
    """First byte, counted from the start of the file."""
    nbytes: int
    row_multiple: int = 1
    """Ranges of rows must start and end at multiples of this (rows of one head are permuted together, say)."""

    @property
    def num_rows(self) -> int:
        """Rows of a matrix; a vector is one row."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def row_nbytes(self) -> int:
        """Stored bytes of one row."""
        return self.nbytes // self.num_rows


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """Where a checkpoint's tokenizer is. Exactly one of the three is set; none means that the model has no tokenizer."""

    directory: Path | None = None
    """Folder with tokenizer.json, or whatever else transformers can read."""
    gguf_metadata: Mapping[str, Any] | None = None
    """The `tokenizer.*` fields of a GGUF file."""
    num_bytes_ids: int | None = None
    """Synthetic models: token ids 0..255 are bytes, this many ids exist."""


class Checkpoint(ABC):
    """An opened checkpoint. Opening has validated every header; no weight has been read."""

    spec: ModelSpec
    path: Path | None
    """The folder or file, None for synthetic weights."""
    tokenizer: TokenizerFiles
    tensors: Mapping[Key, TensorInfo]
    """Every tensor the spec asks for, and no other."""

    @abstractmethod
    def decode(self, info: TensorInfo, raw: npt.NDArray[np.uint8], first_row: int, num_rows: int) -> npt.NDArray[Any]:
        """Turn the stored bytes of rows [first_row, first_row + num_rows) into numbers.

        raw: uint8 [num_rows * info.row_nbytes], any alignment; empty where info.file is None.
        Returns [num_rows, columns], or [elements] for a vector, of NUMPY_OF_ELEMENT[info.element]; may be a view of raw.
        Thread-safe.
        """

    def read(self, layer: int | None, role: Role) -> npt.NDArray[Any]:
        """Read one whole tensor the plain way. Raises CheckpointError when the file cannot be read to its end."""
        info = self.tensors[layer, role]
        raw = np.empty(info.nbytes if info.file else 0, np.uint8)
        if info.file:
            try:
                with info.file.open("rb") as file:
                    file.seek(info.offset)
                    count = file.readinto(raw.data)
            except OSError as error:
                raise CheckpointError(f"{info.file}: cannot read tensor {info.name}: {error.strerror}") from error
            if count != info.nbytes:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} ended after {count} of {info.nbytes} bytes; download the file again"
                )
        return self.decode(info, raw, 0, info.num_rows)

    def close(self) -> None:  # noqa: B027  most formats hold nothing open
        """Release what opening took. Safe to call twice."""
