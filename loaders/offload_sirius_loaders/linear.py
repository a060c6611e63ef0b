"""The tensors of one linear layer in the headers of a checkpoint, by the last word of their names, checked as they are asked for.

Knows no way of quantising: those say which tensors they need, of which types and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from offload_sirius_loaders.checkpoint import Companion
from offload_sirius_loaders.errors import CheckpointError
from offload_sirius_loaders.shard import StoredTensor

SCALE_DTYPES = ("F32", "F16", "BF16")

_UNUSED = ("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_scale_ub", "activation_scale")
"""Bias is a tensor of its own; the others say how to quantise activations, which is not done."""


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One linear layer, y = x W^T."""

    directory: Path
    """What messages name where a tensor is missing."""
    name: str
    """model.layers.0.mlp.up_proj"""
    num_out: int
    """Rows of W."""
    num_in: int
    """Columns of W."""
    tensors: Mapping[str, StoredTensor]
    """Last word of the name -> tensor, all that the files have of this layer."""

    def has(self, word: str) -> bool:
        """Whether the files have it."""
        return word in self.tensors

    def need(self, word: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...], why: str = "") -> StoredTensor:
        """A tensor of one of these types and shapes. why: what in config.json asks for the shapes."""
        tensor = self.tensors.get(word)
        if tensor is None:
            raise CheckpointError(
                f"{self.directory}: tensor {self.name}.{word} is missing, without which its layer cannot be read{_because(why)}; "
                "download the checkpoint again"
            )
        if tensor.dtype not in dtypes:
            raise self.error(word, f"is stored as {tensor.dtype}, {' or '.join(dtypes)} is needed{_because(why)}")
        if tensor.shape not in shapes:
            needed = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
            raise self.error(word, f"has shape {list(tensor.shape)}, {needed} is needed{_because(why)}")
        return tensor

    def companion(self, word: str, tensor: StoredTensor, span: int) -> Companion:
        """That tensor as one read along: its first dimension are its rows, each for `span` rows of the matrix."""
        num_rows = tensor.shape[0] if tensor.shape else 1
        return Companion(name=word, file=tensor.file, offset=tensor.offset, nbytes=tensor.nbytes, num_rows=num_rows, span=span)

    def whole(self, word: str, tensor: StoredTensor, span: int) -> Companion:
        """That tensor as one read along as a whole with any rows of the matrix, of which there are `span`."""
        return replace(self.companion(word, tensor, span), num_rows=1)

    def refuse_others(self, known: tuple[str, ...]) -> None:
        """A tensor that nobody asks for is a part of the layer that would be left out, and only the text would show it."""
        for word in self.tensors:
            if word not in (*known, *_UNUSED):
                raise self.error(word, "is no part of a layer that is quantised so")

    def error(self, word: str, text: str) -> CheckpointError:
        """The error that says `text` of a tensor that is there."""
        return CheckpointError(
            f"{self.tensors[word].file}: tensor {self.name}.{word} {text}; download config.json and weights of the same model, "
            "or use another revision"
        )


def _because(why: str) -> str:
    return f" with {why}" if why else ""
