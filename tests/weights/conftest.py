"""Libraries that tests of this room compile stay out of the user's cache folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from offload_sirius.kernels.native import native


@pytest.fixture(scope="package", autouse=True)
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For the tests of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFLOAD_SIRIUS_CACHE", str(tmp_path_factory.mktemp("cache")))
        native.cache_clear()
        yield
    native.cache_clear()
