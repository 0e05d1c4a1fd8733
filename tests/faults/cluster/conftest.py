"""One live cluster for each topology and module: starting one takes some ten seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from live import ONE_PAIR_BLOCKS, Live


@pytest.fixture(scope="module")
def one_pair() -> Iterator[Live]:
    # Room for three long prompts at a time, so that blocks are used again soon after they were freed.
    live = Live(1, 1, KVFERRY_ENGINE_NUM_BLOCKS=str(ONE_PAIR_BLOCKS))
    yield live
    live.close()
