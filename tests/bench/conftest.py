"""What the tests of the benchmarks share: buffers of a size for tests."""

from __future__ import annotations

import pytest

from offload_sirius.units import KIB


@pytest.fixture
def short_walks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Each measurement moves only so many bytes."""
    nbytes = 256 * KIB
    for module in ("ways", "link", "stream"):
        monkeypatch.setattr(f"offload_sirius.bench.{module}.WALK_NBYTES", nbytes)
    return nbytes
