"""Run language models larger than the device's memory: weights are streamed at the speed of the link.

import offload_sirius

engine = offload_sirius.load("llama-3-70b", device_memory="20GiB")
print(engine.generate("Why is the sky blue?").text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from offload_sirius.engine import load


def __getattr__(name: str) -> Any:
    # torch takes a second to import: `offload-sirius --help` shall not wait for it.
    if name == "load":
        from offload_sirius.engine import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
