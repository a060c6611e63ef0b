"""A model as lm-evaluation-harness asks for one: log-likelihoods by the full model, texts in the mode asked for.

Importing this registers it as `offload-sirius`. Texts are scored one after the other, those that share a beginning next to each
other, so that what they share stays in the KV cache; choices of a single token take one pass. Texts are written together.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import offload_sirius
from offload_sirius.config import SamplingConfig, names_of
from offload_sirius.engine.batch import Answer, Batch
from offload_sirius.errors import ConfigError

_LOG = logging.getLogger(__name__)

TEXT_SETTINGS = ("device_memory", "host_memory", "model", "dtype", "device")
"""Settings that stay text where the harness has made a number of them, 0.5 for one."""

LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names that tasks have for the longest text; the first one counts."""

Pair = tuple[tuple[str, str] | None, list[int], list[int]]
"""Texts, by which the harness caches, context and continuation."""


@register_model("offload-sirius")
class OffloadSiriusLM(TemplateLM):  # type: ignore[misc]  # the harness has no annotations that hold
    """`--model_args`: model=..., and any setting of offload_sirius.load, such as device_memory=6GiB or mode=full.

    max_gen_toks: tokens of a text where the task does not say.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        max_gen_toks: int = 256,
        batch_size: object = None,
        max_batch_size: object = None,
        **settings: Any,
    ) -> None:
        """Load the model. batch_size, max_batch_size: the harness gives them; `parallel` is what says how many texts are written
        together, as it decides what memory is planned for."""
        super().__init__()
        given: dict[str, Any] = {
            name: str(value) if name in TEXT_SETTINGS else value for name, value in settings.items() if value is not None
        }
        self.engine = offload_sirius.load(model, **given)
        self.max_gen_toks = int(max_gen_toks)
        if self.max_gen_toks >= self.max_length:
            raise ConfigError(
                f"max_gen_toks is {self.max_gen_toks}, and there are {self.max_length} positions; give a larger max_context"
            )
        if batch_size not in (None, 1, "1", "auto"):
            _LOG.warning("batch_size %s has no effect: give parallel in model_args", batch_size)

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self.engine.context - 1

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text."""
        return min(self.engine.model.end_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        begin = self.engine.model.tokenizer.begin_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """By which the harness caches prompts."""
        return self.engine.spec.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Ids of a text; a begin token is not put before one that a chat template has written already."""
        tokenizer = self.engine.model.tokenizer
        plain = tokenizer.encode(string, add_special_tokens=False)
        if add_special_tokens is False or (plain and plain[0] == tokenizer.begin_token_id):
            return plain
        return tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. add_generation_prompt: an answer follows; else the last message is one that goes on."""
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        asked = chat_history if add_generation_prompt else chat_history[:-1]
        return (
            self.engine.model.tokenizer.render_chat([{"role": each["role"], "content": each["content"]} for each in asked])
            + begun
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows as long as the context where they are longer."""
        return [self._rolling(*each.args) for each in tqdm(requests, disable=disable_tqdm, desc="Rolling log-likelihoods")]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts, each up to the first of its stop strings; as many are written together as `parallel` says.

        Of equal requests that are drawn each has the seed behind that of the one before.
        """
        order = sorted(range(len(requests)), key=lambda index: str(requests[index].args[0]))
        batch, answers, counts = self.engine.batch(), dict[int, Answer](), Counter[str]()
        for index in order:
            context, settings = requests[index].args
            equal = repr((context, settings))
            answers[index] = self._submit(batch, context, settings, draw=counts[equal])
            counts[equal] += 1
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as progress:
            while batch.step():
                progress.update(sum(answer.state == "done" for answer in answers.values()) - progress.n)
        texts = [answers[index].result.text for index in range(len(requests))]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length - 1, 1)
        pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
        found = sum(likelihood for likelihood, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True))
        self.cache_hook.add_partial("loglikelihood_rolling", (text,), found)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether the model would choose it); long contexts lose their beginning."""
        likelihoods: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Log-likelihoods") as progress:
            for context, indices in self._by_context(requests):
                scores = self.engine.score(context, [requests[index][2] for index in indices])
                for index, tokens in zip(indices, scores, strict=True):
                    likely = all(each.is_likeliest for each in tokens)
                    likelihoods[index] = sum(each.log_probability for each in tokens), likely
                    if (texts := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, likelihoods[index])
                progress.update(len(indices))
        return likelihoods

    def _by_context(self, requests: Sequence[Pair]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, indices of its requests), contexts in an order in which neighbours share what they can."""
        contexts = [self._cut(context, len(continuation)) for _, context, continuation in requests]
        # A continuation without tokens has been scored already: it is certain.
        order = sorted((index for index in range(len(requests)) if requests[index][2]), key=lambda index: contexts[index])
        for context, indices in groupby(order, key=lambda index: contexts[index]):
            yield context, list(indices)

    def _cut(self, token_ids: list[int], num_behind: int) -> list[int]:
        """The end of a context, as much as there is room for with so many tokens behind it. Raises ConfigError for none."""
        room = self.max_length - num_behind
        if room < 1:
            raise ConfigError(f"{num_behind} tokens behind a context are more than max_context has room for; raise it")
        if len(token_ids) > room:
            _LOG.warning("a context of %d tokens is cut to its last %d; raise max_context", len(token_ids), room)
        return token_ids[-room:]

    def _submit(self, batch: Batch, context: str, settings: dict[str, Any], *, draw: int) -> Answer:
        """draw: number of equal requests before."""
        settings = {name: value for name, value in settings.items() if value is not None}
        until = settings.pop("until", None) or []
        stops = tuple(each for each in ([until] if isinstance(until, str) else until) if each)
        limits = [settings.pop(name) for name in LIMITS if name in settings]
        max_new_tokens = int(limits[0]) if limits else self.max_gen_toks
        draws = settings.pop("do_sample", None)
        if unknown := sorted(set(settings) - names_of(SamplingConfig)):
            _LOG.warning("%s: no setting of this model, left out", ", ".join(unknown))
        sampling = {name: value for name, value in settings.items() if name in names_of(SamplingConfig)}
        if draws is not None:
            sampling["temperature"] = float(sampling.get("temperature", 1.0)) if draws else 0.0
        if sampling.get("temperature", 0.0) > 0:
            sampling["seed"] = (int(sampling.get("seed", SamplingConfig().seed)) + draw) % 2**64
        prompt_ids = self._cut(self.tok_encode(context), max_new_tokens)
        return batch.submit(prompt_ids, max_new_tokens=max_new_tokens, stop=stops, **sampling)
