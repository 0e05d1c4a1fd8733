"""What a link holds of a region that its peer took back is let go beside the event loop: GPU memory makes that wait."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kvferry.testing.conformance import BLOCK, wait_until
from kvferry.testing.engines import EngineThread, LocalOwner
from kvferry.transport.base import RemoteRegion


def test_a_link_that_waits_while_it_forgets_does_not_hold_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = LocalOwner(("tcp",))
    region_id = owner.call("region", BLOCK, seed=1)
    with EngineThread(("tcp",)) as reader:
        peer = reader.connect(owner.address)
        link = peer.ways[0].link
        assert link is not None
        entered, leave = threading.Event(), threading.Event()
        forgotten: list[tuple[int, bool]] = []

        def forget(region: RemoteRegion) -> None:
            entered.set()
            forgotten.append((region.region_id, leave.wait(60.0)))

        monkeypatch.setattr(link, "forget", forget)
        owner.call("unregister", region_id)
        assert entered.wait(60.0)
        # The loop turns meanwhile: it takes this, and the peer's next words.
        reader.run(asyncio.sleep(0))
        more = owner.call("region", BLOCK, seed=2)
        wait_until(lambda: more in peer.regions)
        leave.set()
    assert forgotten == [(region_id, True)]
    owner.close()
