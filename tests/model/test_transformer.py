from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from offload_sirius.errors import ConfigError, PromptError
from offload_sirius.model.costs import activation_nbytes, position_tables_nbytes
from offload_sirius.model.dense import DenseSource
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.source import AttentionWeights, NeuronWeights
from offload_sirius.model.transformer import Tokens, TokenTree, Transformer
from offload_sirius_loaders.checkpoint import Key
from offload_sirius_loaders.spec import ModelSpec, RopeSpec

TOLERANCE = 1e-5
"""The same sums in another order."""

SPEC = ModelSpec(
    name="test",
    architecture="qwen3",
    num_layers=3,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_width=56,
    vocab_size=61,
    max_positions=512,
    norm_eps=1e-5,
    rope=RopeSpec(),
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
    layer_windows=(None, 6, None),
)


def random_tensors(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[Key, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[Key, tuple[int, ...]] = {(None, role): shape for role, shape in spec.model_roles().items()}
    for layer in range(spec.num_layers):
        shapes |= {(layer, role): shape for role, shape in spec.layer_roles().items()}
    return {key: (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) for key, shape in shapes.items()}


def build(
    spec: ModelSpec = SPEC, *, capacity: int = 64, chunk_size: int = 512, dtype: torch.dtype = torch.float32
) -> Transformer:
    cache = KVCache(spec, capacity, dtype=dtype)
    return Transformer(spec, DenseSource(spec, random_tensors(spec, dtype)), cache, chunk_size=chunk_size)


def tokens(count: int) -> Tensor:
    return torch.randint(0, SPEC.vocab_size, (count,), generator=torch.Generator().manual_seed(count))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 40])
def test_chunks_of_any_size_give_the_same_logits_and_the_same_cache(chunk_size: int) -> None:
    whole, chunked = build(), build(chunk_size=chunk_size)

    assert_close(chunked.prefill(tokens(40)), whole.prefill(tokens(40)))
    assert_close(chunked.cache.keys[:, :, :, :40], whole.cache.keys[:, :, :, :40])
    assert_close(chunked.cache.values[:, :, :, :40], whole.cache.values[:, :, :, :40])


def test_prefill_and_steps_give_the_logits_of_one_pass_over_everything() -> None:
    prompted, whole = build(), build()

    logits = [prompted.prefill(tokens(30)[:10])[None], *(prompted.step(each) for each in tokens(30)[10:].split(1))]

    assert_close(torch.cat(logits), whole.step(tokens(30))[9:])


def test_a_step_of_several_tokens_equals_single_steps() -> None:
    several, single = build(), build()
    several.prefill(tokens(9))
    single.prefill(tokens(9))

    assert_close(several.step(tokens(8)), torch.cat([single.step(each) for each in tokens(8).split(1)]))


def test_tokens_taken_back_leave_no_trace() -> None:
    back, straight = build(), build()
    back.prefill(tokens(9))
    straight.prefill(tokens(9))

    back.step(tokens(20))
    back.cache.truncate(9)

    assert torch.equal(back.step(tokens(3)), straight.step(tokens(3)))


def test_a_second_prompt_goes_on_where_the_first_ended() -> None:
    twice, once = build(), build()
    twice.prefill(tokens(30)[:13])

    assert_close(twice.prefill(tokens(30)[13:]), once.prefill(tokens(30)))


def test_each_branch_of_a_tree_gets_the_logits_it_would_get_as_a_line() -> None:
    # Slots 9, ..., 13 hold a root, its two children, and a child of each: branches [0, 1, 3] and [0, 2, 4].
    branches = ([0, 1, 3], [0, 2, 4])
    mask = torch.ones(5, 14, dtype=torch.bool)
    mask[:, 9:] = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]])
    tree = TokenTree(positions=torch.tensor([9, 10, 10, 11, 11]), mask=mask)
    branched = build()
    branched.prefill(tokens(9))

    logits = branched.step(tokens(5), tree)

    for branch in branches:
        line = build()
        line.prefill(tokens(9))
        assert_close(logits[branch], line.step(tokens(5)[branch]))


def test_a_branch_that_grows_step_by_step_beside_others_gets_the_logits_it_would_get_as_a_line() -> None:
    # Slots 9, ..., 13: a root, its three children, and a child of the last of those, which is two positions behind the root and
    # four slots. A layer that sees six positions still sees positions 6, 7 and 8.
    steps = ([0], [1, 2, 3], [4])
    seen = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]])
    positions, branch = torch.tensor([9, 10, 10, 10, 11]), [0, 3, 4]
    branched, line = build(), build()
    branched.prefill(tokens(9))
    line.prefill(tokens(9))

    logits = []
    for nodes in steps:
        mask = torch.ones(len(nodes), 10 + nodes[-1], dtype=torch.bool)
        mask[:, 9:] = seen[nodes, : nodes[-1] + 1]
        logits.append(branched.step(tokens(5)[nodes], TokenTree(positions=positions[: nodes[-1] + 1], mask=mask)))

    assert_close(torch.cat(logits)[branch], line.step(tokens(5)[branch]))


@dataclass
class RecordingSource:
    """A source that writes down what it is asked for, and may fail at a layer."""

    dense: DenseSource
    asked: list[tuple[str, int]]
    failing_layer: int | None = None

    @property
    def final_norm(self) -> Tensor:
        return self.dense.final_norm

    @property
    def head(self) -> Tensor:
        return self.dense.head

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.dense.embed(token_ids)

    def attention(self, layer: int) -> AttentionWeights:
        self.asked.append(("attention", layer))
        if layer == self.failing_layer:
            raise OSError("gone")
        return self.dense.attention(layer)

    def neurons(self, layer: int) -> NeuronWeights:
        self.asked.append(("neurons", layer))
        return self.dense.neurons(layer)

    def release(self, layer: int) -> None:
        self.asked.append(("release", layer))


def recording() -> tuple[RecordingSource, Transformer]:
    source = RecordingSource(DenseSource(SPEC, random_tensors(SPEC)), [])
    return source, Transformer(SPEC, source, KVCache(SPEC, 64, dtype=torch.float32), chunk_size=16)


ONE_PASS = [(call, layer) for layer in range(3) for call in ("attention", "neurons", "release")]


@pytest.mark.parametrize("num_tokens", [1, 16, 50])
def test_a_prompt_of_any_length_is_one_pass_over_the_weights(num_tokens: int) -> None:
    source, transformer = recording()

    transformer.prefill(tokens(num_tokens))

    assert source.asked == ONE_PASS


def test_a_step_of_several_tokens_is_one_pass_over_the_weights() -> None:
    source, transformer = recording()

    transformer.step(tokens(17))

    assert source.asked == ONE_PASS


def test_a_pass_that_fails_leaves_the_cache_as_it_was() -> None:
    source, transformer = recording()
    transformer.prefill(tokens(9))
    expected = transformer.step(tokens(2))
    transformer.cache.truncate(9)

    source.failing_layer = 1
    with pytest.raises(OSError, match="gone"):
        transformer.step(tokens(5))

    source.failing_layer = None
    assert transformer.cache.length == 9
    assert torch.equal(transformer.step(tokens(2)), expected)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match=r"^the prompt has no tokens, at least one is needed; give a text that is not empty$"):
        build().prefill(tokens(0))


@pytest.mark.parametrize("call", [Transformer.prefill, Transformer.step])
def test_tokens_that_do_not_fit_are_refused_before_any_work(call: Callable[[Transformer, Tensor], Tensor]) -> None:
    source, transformer = recording()

    with pytest.raises(PromptError, match=r"^the context needs 65 positions, the KV cache has room for 64; shorten the prompt"):
        call(transformer, tokens(65))

    assert source.asked == []


def test_the_last_position_of_the_cache_is_used() -> None:
    transformer = build(capacity=12)
    transformer.prefill(tokens(11))

    transformer.step(tokens(1))

    assert transformer.cache.length == 12


def test_an_unknown_activation_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(ConfigError, match=r"^activation 'mush' is not known"):
        build(replace(SPEC, activation="mush"))


def test_logits_are_float32_and_near_when_computed_in_bfloat16() -> None:
    half, full = build(dtype=torch.bfloat16), build()

    logits = half.prefill(tokens(20))

    assert logits.dtype == half.step(tokens(2)).dtype == torch.float32
    assert (logits - full.prefill(tokens(20))).abs().max() <= 0.1


def test_a_common_model_runs_without_importing_transformers() -> None:
    program = """
import sys, torch
from offload_sirius.model.kv_cache import KVCache
from offload_sirius.model.transformer import Transformer
from offload_sirius_loaders.spec import ModelSpec, RopeSpec
spec = ModelSpec(name="", architecture="llama", num_layers=0, width=8, num_heads=1, num_kv_heads=1, head_dim=8, ffn_width=8,
                 vocab_size=8, max_positions=8, norm_eps=1e-5, rope=RopeSpec(kind="linear", parameters={"factor": 2.0}))
Transformer(spec, None, KVCache(spec, 8, dtype=torch.float32))
sys.exit("transformers" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(("dtype", "element_nbytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_bill_of_position_tables_is_what_they_weigh(dtype: torch.dtype, element_nbytes: int) -> None:
    assert build(capacity=48, dtype=dtype).nbytes == position_tables_nbytes(SPEC, 48, element_nbytes)


def peak_allocated_nbytes(work: Callable[[], object], trace: Path) -> int:
    """Highest sum of what was allocated and not yet freed while work ran, as torch's profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


WIDE = replace(SPEC, width=512, num_heads=8, num_kv_heads=2, head_dim=64, ffn_width=1408, vocab_size=2048)
BIG_VOCABULARY = replace(SPEC, vocab_size=50_000)


@pytest.mark.parametrize("spec", [SPEC, WIDE, BIG_VOCABULARY], ids=["tiny", "wide", "big vocabulary"])
@pytest.mark.parametrize(("num_tokens", "chunk_size"), [(1, 512), (17, 512), (300, 512), (300, 64), (600, 512)])
def test_the_bill_of_activations_is_at_least_what_a_prefill_allocates_and_less_than_thrice_it(
    spec: ModelSpec, num_tokens: int, chunk_size: int, tmp_path: Path
) -> None:
    # In float32: bfloat16 matmuls of a CPU take packed copies of the weights for themselves.
    transformer = build(spec, capacity=num_tokens, chunk_size=chunk_size)

    peak_nbytes = peak_allocated_nbytes(lambda: transformer.prefill(tokens(num_tokens)), tmp_path / "trace.json")

    assert peak_nbytes <= activation_nbytes(spec, num_tokens, 4, chunk_size) <= 3 * peak_nbytes


def test_a_step_after_the_prompt_stays_within_the_bill_of_the_prompt(tmp_path: Path) -> None:
    transformer = build(WIDE, capacity=301)
    transformer.prefill(tokens(300))

    peak_nbytes = peak_allocated_nbytes(lambda: transformer.step(tokens(1)), tmp_path / "trace.json")

    assert peak_nbytes <= activation_nbytes(WIDE, 300, 4)


@pytest.mark.parametrize("rope", [RopeSpec(), RopeSpec(kind="dynamic", parameters={"factor": 16.0})], ids=["fixed", "dynamic"])
def test_sequences_that_share_passes_are_each_what_they_are_alone(rope: RopeSpec) -> None:
    spec = replace(SPEC, rope=rope, max_positions=64)
    source = DenseSource(spec, random_tensors(spec))
    caches = [KVCache(spec, 64, dtype=torch.float32) for _ in range(3)]
    together = Transformer(spec, source, caches[0], chunk_size=8, more_caches=caches[1:])
    alone = [Transformer(spec, source, KVCache(spec, 64, dtype=torch.float32), chunk_size=8) for _ in caches]
    prompts = [tokens(19), tokens(3), tokens(8)]
    found = together.prefill_all(each_with(caches, prompts))
    assert_close(found, torch.stack([one.prefill(prompt) for one, prompt in zip(alone, prompts, strict=True)]))
    # Lines and a tree, of different lengths, side by side.
    start = caches[2].length
    tree = TokenTree(
        positions=torch.tensor([start, start + 1, start + 1]),
        mask=torch.cat((torch.ones(3, start), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]])), dim=1).bool(),
    )
    steps = [tokens(1), tokens(5), tokens(3)]
    found = together.step_all(each_with(caches, steps, trees=[None, None, tree]))
    expected = [one.step(step, tree if step is steps[2] else None) for one, step in zip(alone, steps, strict=True)]
    assert_close(found, torch.cat(expected))
    assert [cache.length for cache in caches] == [one.cache.length for one in alone] == [20, 8, 11]
    # Two of them further, a third waits.
    found = together.step_all(each_with(caches[:2], [tokens(2), tokens(4)]))
    assert_close(found, torch.cat([alone[0].step(tokens(2)), alone[1].step(tokens(4))]))
    assert_close(together.step_all(each_with(caches[2:], [tokens(1)])), alone[2].step(tokens(1)))
    assert together.nbytes == position_tables_nbytes(spec, 64, 4, batch=3)


def each_with(caches: list[KVCache], token_ids: list[Tensor], trees: Sequence[TokenTree | None] | None = None) -> list[Tokens]:
    parts = zip(caches, token_ids, trees or [None] * len(caches), strict=True)
    return [Tokens(cache=cache, token_ids=ids, tree=tree) for cache, ids, tree in parts]


@pytest.mark.parametrize("lengths", [(1, 1, 1), (60, 1, 3), (24, 24, 24)])
def test_steps_of_several_sequences_stay_within_the_bill(lengths: tuple[int, ...], tmp_path: Path) -> None:
    caches = [KVCache(WIDE, 128, dtype=torch.float32) for _ in lengths]
    transformer = Transformer(WIDE, DenseSource(WIDE, random_tensors(WIDE)), caches[0], more_caches=caches[1:])
    transformer.prefill_all(each_with(caches, [tokens(40)] * 3))
    steps = each_with(caches, [tokens(length) for length in lengths])

    peak_nbytes = peak_allocated_nbytes(lambda: transformer.step_all(steps), tmp_path / "trace.json")

    assert peak_nbytes <= activation_nbytes(WIDE, 128, 4, step_rows=sum(lengths))
