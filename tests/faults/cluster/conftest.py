"""One live cluster for each topology and module: starting one takes some ten seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live import Live


@pytest.fixture(scope="module")
def one_pair() -> Iterator[Live]:
    live = Live(1, 1)
    yield live
    live.close()
