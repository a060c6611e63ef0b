"""Ways of decoding to be compared: lists of settings made into rows, and what all rows have in common. Without torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import product
from math import ceil, floor

from offload_sirius.config import (
    Accept,
    DecodingConfig,
    Draft,
    DraftQuantize,
    GenerationConfig,
    Mode,
    Sparsity,
    require_greedy_threshold,
)
from offload_sirius.errors import ConfigError

FULL = DecodingConfig(mode="full")
"""Measured with every other variant, as what it is compared with."""


@dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """What is measured: the full model, and some other ways of decoding."""

    prompts: tuple[str, ...]
    """At least one."""
    variants: tuple[DecodingConfig, ...]
    """Beside the full model."""
    generation: GenerationConfig
    forced_aal: Fraction | None = None
    """Average advancement length that every mode sirius is made to have; answers then go past the model's end tokens."""

    def __post_init__(self) -> None:
        for variant in self.variants:
            require_greedy_threshold(variant, self.generation.sampling)
        if self.forced_aal is not None:
            _require_forcible(
                self.forced_aal,
                [variant for variant in self.variants if variant.mode == "sirius"],
                self.generation.max_new_tokens,
            )

    @property
    def num_tokens(self) -> int:
        """Longest answer: the last window of one whose acceptance is forced is a whole one."""
        longest = self.generation.max_new_tokens
        if self.forced_aal is None:
            return longest
        return 1 + forced_tokens(self.forced_aal, num_forced_windows(self.forced_aal, longest - 1))

    @property
    def num_ahead(self) -> int:
        """Positions beyond the longest answer: other branches of trees, and what the last forced window drafts in vain."""
        if self.forced_aal is not None:
            return max(variant.max_window for variant in self.variants if variant.mode == "sirius")
        return max((variant.num_side_nodes for variant in self.variants), default=0)

    @property
    def loads(self) -> list[tuple[DecodingConfig, ...]]:
        """Variants that one load answers, the full model's first."""
        found: dict[tuple[Sparsity, float, Draft], list[DecodingConfig]] = defaultdict(list)
        for variant in self.variants:
            found[variant.sparsity, variant.keep, variant.draft].append(variant)
        return [(FULL,), *map(tuple, found.values())]


def variants_of(
    shared: DecodingConfig,
    *,
    modes: Sequence[Mode],
    sparsities: Iterable[Sparsity],
    keeps: Iterable[float],
    windows: Iterable[int | str],
    accepts: Iterable[Accept],
    tree_widths: Iterable[int],
    drafts: Iterable[Draft],
    draft_keep: float | None = None,
    draft_quantize: DraftQuantize = "none",
) -> tuple[DecodingConfig, ...]:
    """The cross product, each once; mode full is left out, as it is measured anyway. Raises ConfigError.

    shared: what all have in common; its threshold of cats only those with cats. draft_keep, draft_quantize: of drafts that
    may be resident.
    """
    variants: list[DecodingConfig] = []
    corrected = list(product(windows, tree_widths, accepts))
    for sparsity, keep, draft in product(sparsities, keeps, drafts):
        gates = shared.cats_threshold if sparsity == "cats" else None
        may_be_resident = draft != "streamed" and sparsity == "griffin"
        sparse = replace(
            shared,
            mode="sparse",
            sparsity=sparsity,
            keep=keep,
            cats_threshold=gates,
            draft=draft,
            draft_keep=draft_keep if may_be_resident else None,
            draft_quantize=draft_quantize if may_be_resident else "none",
        )
        if "sparse" in modes:
            variants.append(sparse)
        if "sirius" in modes:
            variants += [
                replace(sparse, mode="sirius", window=window, tree_width=width, accept=accept)
                for window, width, accept in corrected
            ]
    return tuple(dict.fromkeys(variants))


def name_of(variant: DecodingConfig, forced_aal: Fraction | None = None) -> str:
    """A way of decoding in a few words."""
    if not variant.drafts:
        return "full"
    place = "" if variant.draft == "auto" else f" {variant.draft}"
    if variant.draft_quantize != "none":
        place += f" {variant.draft_quantize} copy"
    keep = f"{variant.keep:g}" if variant.draft_keep is None else f"{variant.draft_keep:g} of {variant.keep:g}"
    gates = "" if variant.cats_threshold is None else f" gates {variant.cats_threshold}"
    name = f"{variant.sparsity} {keep}{gates}{place} {variant.mode}"
    if variant.mode == "sparse":
        return name
    accept = variant.accept if variant.accept == "exact" else f"threshold {variant.threshold:g}"
    rule = accept if forced_aal is None else f"forced {float(forced_aal):g}"
    tree = "" if variant.tree_width == 1 else f" t{variant.tree_width}"
    lookup = {None: "", True: " lookup", False: " no lookup"}[variant.lookup]
    return f"{name} {rule} w{variant.window}{tree}{lookup}"


def roomiest(variants: Sequence[DecodingConfig]) -> DecodingConfig:
    """The one whose load has room for all of them. They keep the same neurons."""
    return max(variants, key=lambda variant: (variant.max_drafted_nodes, variant.max_nodes))


def forced_tokens(aal: Fraction, num_windows: int) -> int:
    """Tokens that so many windows of a forced average advancement length give together."""
    return floor(num_windows * aal)


def num_forced_windows(aal: Fraction, num_tokens: int) -> int:
    """The most windows that give no more than so many tokens together."""
    return ceil((num_tokens + 1) / aal) - 1


def _require_forcible(aal: Fraction, variants: Sequence[DecodingConfig], max_new_tokens: int) -> None:
    if not variants:
        raise ConfigError("--force-aal is for mode sirius; add it to --modes")
    for variant in variants:
        if variant.tree_width != 1:
            raise ConfigError(f"--force-aal is for lines, and --tree-width is {variant.tree_width}; give --tree-width 1")
        if not isinstance(variant.window, int):
            raise ConfigError(
                f"--force-aal is for fixed windows, and --window is {variant.window}; give a number, such as --window 16"
            )
        if not 1 <= aal <= variant.window:
            raise ConfigError(f"--force-aal is {float(aal):g}; it must be between 1 and --window {variant.window}")
        if variant.accept != "exact":
            raise ConfigError(f"--force-aal decides what is accepted, and --accept is {variant.accept}; leave --accept out")
        if variant.lookup:
            raise ConfigError("--force-aal decides what is accepted, of drafted tokens alone; leave --lookup out")
    if num_forced_windows(aal, max_new_tokens - 1) < 1:
        least = 1 + forced_tokens(aal, 1)
        raise ConfigError(
            f"--max-new-tokens is {max_new_tokens}; a first token and one window of --force-aal {float(aal):g} take {least}"
        )
