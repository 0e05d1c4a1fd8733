"""Each half's attachment to the pool has the deadline that is set for it."""

from typing import Any

import pytest
import torch

from kvferry.connector.vllm import pool
from kvferry.connector.vllm.layouts import Geometry
from kvferry.connector.vllm.settings import settings_from_extra_config
from kvferry.layout import Fingerprint


def test_a_ranks_loads_and_saves_have_their_own_deadline_and_lookups_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(pool, "PoolAttachment", lambda *_, **options: made.append(options))
    settings = settings_from_extra_config({"pool": "tcp://127.0.0.1:1", "pool_wait_s": 0.3, "pool_deadline_s": 7})
    caches = {"layers.0": torch.zeros(4, 2, 16, 8)}
    _, space = pool.attach_memory(
        caches, Geometry(4, 16), settings=settings, fingerprint=Fingerprint("m", "float32", 16, 1, 2, 4), wake=print
    )
    pool.attach_lookup(space, settings)
    assert [options["deadline_s"] for options in made] == [7, 0.3]
