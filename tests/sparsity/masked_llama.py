"""Sparse models of transformers, for tests: a dense Llama whose feed-forward blocks are masked. The rules of GRIFFIN and CATS and
the correction of Sirius, each written as its paper says it, with none of this project's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

Rule = Literal["griffin", "cats"]
Doing = Literal["dense", "observing", "sparse"]


class MaskedMLP(nn.Module):
    """act(x Wg^T) * (x Wu^T) Wd^T over all neurons, or with all but some of them at zero."""

    def __init__(self, dense: Any, rule: Rule, keep: float) -> None:
        super().__init__()
        self.dense = dense
        self.rule = rule
        self.num_kept = int(dense.gate_proj.out_features * keep)
        self.doing: Doing = "dense"
        self.kept = torch.empty(0, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """x [1, S, D] -> [1, S, D]"""
        gates = self.dense.act_fn(self.dense.gate_proj(x))  # [1, S, F]
        if self.doing == "sparse" and self.rule == "cats":
            self.kept = gates[0].abs().sum(dim=0).topk(self.num_kept).indices
        z = gates * self.dense.up_proj(x)
        if self.doing == "observing" and self.rule == "griffin":
            shares = z[0] / z[0].norm(dim=1, keepdim=True)  # [S, F]
            self.kept = shares.norm(dim=0).topk(self.num_kept).indices
        if self.doing == "sparse":
            mask = torch.zeros(z.shape[-1])
            mask[self.kept] = 1
            z = z * mask
        out: Tensor = self.dense.down_proj(z)
        return out


class SparseReference:
    """A model of transformers with a cache of its own, dense or sparse, pass by pass."""

    def __init__(self, model: Any, rule: Rule, keep: float) -> None:
        """model: whose feed-forward blocks are replaced, those of a reference before it too."""
        self._model = model
        self._blocks = []
        for layer in model.model.layers:
            layer.mlp = MaskedMLP(getattr(layer.mlp, "dense", layer.mlp), rule, keep)
            self._blocks.append(layer.mlp)
        self._cache = DynamicCache()

    @torch.inference_mode()
    def run(self, token_ids: Sequence[int], doing: Doing) -> Tensor:
        """Logits [S, V] behind tokens that are appended."""
        for block in self._blocks:
            block.doing = doing
        output = self._model(torch.tensor([token_ids]), past_key_values=self._cache, use_cache=True)
        logits: Tensor = output.logits[0]
        return logits

    def cut(self, length: int) -> None:
        """Keep that many positions."""
        if (num_left_over := self._cache.get_seq_length() - length) > 0:
            self._cache.crop(-num_left_over)

    def sparse_answer(self, prompt: Sequence[int], num_new: int) -> list[int]:
        """Greedy: the prompt dense, every token behind it sparse."""
        self._cache = DynamicCache()
        token_ids = [int(self.run(prompt, "observing")[-1].argmax())]
        while len(token_ids) < num_new:
            token_ids.append(int(self.run(token_ids[-1:], "sparse")[-1].argmax()))
        return token_ids

    def corrected_answer(self, prompt: Sequence[int], num_new: int, window: int, threshold: float) -> tuple[list[int], float]:
        """Greedy drafts, of which the longest prefix stands that the full model finds likely enough, and its average advancement
        length. At the end nothing is drafted that there is no room for."""
        self._cache = DynamicCache()
        answer = [int(self.run(prompt, "observing")[-1].argmax())]
        advanced = []
        while len(answer) < num_new:
            start = len(prompt) + len(answer) - 1
            drafted = [answer[-1]]
            for _ in range(min(window - 1, num_new - len(answer) - 1)):
                drafted.append(int(self.run(drafted[-1:], "sparse")[-1].argmax()))
            self.cut(start)
            logits = self.run(drafted, "dense")
            probabilities = (logits / 0.6).softmax(dim=1)
            num_accepted = 0
            while num_accepted + 1 < len(drafted) and probabilities[num_accepted, drafted[num_accepted + 1]] >= threshold:
                num_accepted += 1
            answer += [*drafted[1 : num_accepted + 1], int(logits[num_accepted].argmax())]
            self.cut(start + num_accepted + 1)
            advanced.append(num_accepted + 1)
        return answer, sum(advanced) / len(advanced)
