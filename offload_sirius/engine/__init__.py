"""Opening, planning, loading and answering: everything a program needs of this package.

engine = offload_sirius.load("llama-3-70b", device_memory="20GiB")
print(engine.generate("Why is the sky blue?").text)
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offload_sirius.config import DecodingConfig, EngineConfig, names_of
from offload_sirius.engine.progress import NoProgress, Progress
from offload_sirius.errors import ConfigError
from offload_sirius.trace import Tracer

if TYPE_CHECKING:
    from offload_sirius.engine.building import build
    from offload_sirius.engine.engine import Engine
    from offload_sirius.engine.opened import Model, Prompt, open_model

__all__ = ["Engine", "Model", "NoProgress", "Progress", "Prompt", "build", "load", "open_model"]

_HOMES = {"Engine": "engine", "Model": "opened", "Prompt": "opened", "build": "building", "open_model": "opened"}


def __getattr__(name: str) -> Any:
    # Planning takes no weights and no torch: it shall not wait for those who do.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load(model: str | None = None, *, progress: Progress | None = None, tracer: Tracer | None = None, **settings: Any) -> Engine:
    """Open a model, plan, and load it.

    model: alias, hub id, directory, file, or synthetic:SHAPE; settings: the fields of EngineConfig and DecodingConfig;
    tracer: is told of every copy, wait, computation and choice, and writes them as a trace when asked.
    Raises one of offload_sirius.errors.USER_ERRORS, each with one line that says what to do.
    """
    from offload_sirius.engine.building import build
    from offload_sirius.engine.opened import open_model

    given = dict(settings) if model is None else settings | {"model": model}
    own, decoding = names_of(EngineConfig), names_of(DecodingConfig)
    if unknown := sorted(set(given) - own - decoding):
        raise ConfigError(f"unknown setting {unknown[0]}; known are {', '.join(sorted((own | decoding) - {'decoding'}))}")
    if drafted := {name: given.pop(name) for name in decoding & set(given)}:
        given["decoding"] = replace(given.get("decoding", DecodingConfig()), **drafted)
    config = EngineConfig(**given)
    return build(open_model(config.model), config, progress or NoProgress(), tracer)
