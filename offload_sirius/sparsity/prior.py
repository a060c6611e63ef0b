"""What earlier answers of a model say about its neurons, kept in a file between runs: a prior for the hot set.

A short prompt says little about which neurons its answer needs. What each neuron has said of earlier answers, as corrections
compute it anyway, is added to the prompt's statistic as if the prompt had PSEUDO_TOKENS more tokens,

    s_j^2 <- s_j^2 + PSEUDO_TOKENS * mean over tokens of earlier answers of (z_tj / ||z_t||)^2

The shares of a token are 1 together, so that the sums of a layer say how many tokens they rest on. With exact acceptance the
prior changes how many drafted tokens stand, never the text. Knows neither slots nor passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from offload_sirius.cache import safe_name
from offload_sirius.errors import ConfigError
from offload_sirius.files import require_writable, write_whole
from offload_sirius_loaders.checkpoint import Checkpoint, read_rows
from offload_sirius_loaders.spec import ModelSpec

PSEUDO_TOKENS = 32
"""What the prior counts for beside the tokens of a prompt.

Measured on SmolLM2-135M with 14 prompts of 33 to 40 tokens, the chat template's included, after 16 answers to other prompts, by
the share that hot neurons have in what all say of an answer: of 8, 16, 32, 64, 128 and more it is best at 32 where windows
refresh the set, and at 64 or 128, by little, where they do not. By this measure a prior that learns prompts beside answers is
worse.
"""

MOST_TOKENS = 1 << 14
"""Tokens that a layer's sums count for at most: beyond that earlier ones lose weight, so that some dozens of answers of another
kind change what is kept."""

LONGEST_NAME = 80
"""Characters of a model's name in the file's: file systems take 255 bytes, a temporary file's ending included."""


class NeuronPrior:
    """The sums, on the device, and the file they are from."""

    def __init__(self, file: PriorFile, spec: ModelSpec, *, device: torch.device) -> None:
        """Reads the file. Allocates what `sparsity_nbytes` says."""
        self.sums = file.read(spec).to(device)  # [L, F]
        """Of the shares (z_tj / ||z_t||)^2 of each token."""
        self._file = file

    def pseudo_scores(self, layer: int) -> Tensor:
        """What it adds to s^2 of a prompt, float32 [F]. It counts for no more tokens than it has seen."""
        sums = self.sums[layer]
        total = sums.sum()
        return sums * (total.clamp(max=PSEUDO_TOKENS) / total.clamp(min=torch.finfo(torch.float32).tiny))

    def learn(self, layer: int, neuron_ids: Tensor, said: Tensor) -> None:
        """Add what neurons, int64 [F], have said of a correction's tokens: sums of shares, float32 [F], in their order."""
        self.sums[layer].index_add_(0, neuron_ids, torch.where(said.isfinite(), said, 0))  # broken weights teach nothing

    def keep(self) -> None:
        """An answer has ended: write the file. What broken weights have said is forgotten."""
        totals = self.sums.sum(dim=1, keepdim=True)  # [L, 1]
        self.sums.mul_(MOST_TOKENS / totals.clamp(min=MOST_TOKENS))
        self.sums.masked_fill_(~totals.isfinite(), 0)
        self._file.write(self.sums)


class PriorFile:
    """A model's sums in a safetensors file. Where it cannot be used, one line says so, and answers go on without."""

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._writable = True

    def read(self, spec: ModelSpec) -> Tensor:
        """Float32 [L, F] in host memory; zeros where nothing is kept yet, or nothing that can be used.

        Also finds out whether it can be written, so that this is said before there is an answer.
        """
        self._try(lambda: require_writable(self.path, "--prior"))
        empty = torch.zeros(spec.num_layers, spec.ffn_width)
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return empty
        except OSError as error:
            self._give_up(f"cannot be read: {error.strerror}")
            return empty
        sums = _sums_in(content)
        if sums is None or sums.shape != empty.shape:
            self._warn(f"{self.path}: is ignored and will be replaced, it does not hold a prior of {spec.name}")
            return empty
        return sums

    def write(self, sums: Tensor) -> None:
        """Replace the file as a whole: of several processes that write, the last one's stays."""
        self._try(lambda: write_whole(self.path, save({"sums": sums.cpu()})))

    def _try(self, to_write: Callable[[], None]) -> None:
        if not self._writable:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            to_write()
        except (OSError, ConfigError) as error:
            cause = error.__cause__ or error
            self._give_up(f"cannot be written: {cause.strerror if isinstance(cause, OSError) else cause}")

    def _give_up(self, reason: str) -> None:
        """The first reason is said."""
        if self._writable:
            self._writable = False
            self._warn(
                f"{self.path}: {reason}; what this run learns of the model's neurons is not kept: "
                "set OFFLOAD_SIRIUS_CACHE to another folder, or give --no-prior"
            )


def _sums_in(content: bytes) -> Tensor | None:
    """What a file holds; None where that is no sums of shares."""
    try:
        sums = load(content)["sums"]
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None
    if sums.dtype != torch.float32 or sums.dim() != 2 or bool((sums < 0).any()):
        return None
    return sums if bool(sums.sum(dim=1).isfinite().all()) else None


def prior_path(cache_folder: Path, checkpoint: Checkpoint) -> Path:
    """Where the prior of a model is kept. Another model of the same name has another place."""
    name = safe_name(checkpoint.spec.name)[:LONGEST_NAME]
    return cache_folder / "priors" / f"{name}-{fingerprint(checkpoint)}.safetensors"


def fingerprint(checkpoint: Checkpoint) -> str:
    """16 digits, of the model's shape and the first gate rows of every layer: what training further changes."""
    digest = hashlib.sha256(repr(checkpoint.spec).encode())
    for layer in range(checkpoint.spec.num_layers):
        # Records begin with the first gate row.
        info = checkpoint.packed.parts[layer, "records"] if checkpoint.packed else checkpoint.tensors[layer, "gate"]
        # Of random weights, which are in no file, the shape says which they are.
        if info.file is not None:
            digest.update(read_rows(info, 0, min(info.row_multiple, info.num_rows)).tobytes())
    return digest.hexdigest()[:16]
