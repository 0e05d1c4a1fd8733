"""A node that stands still and comes back: nobody waits for it twice, and nobody waits on when it is there again."""

from __future__ import annotations

import asyncio
import signal

from pool_processes import NodeProcess, client_of, eventually, name, put, stop


async def test_a_node_that_answers_late_is_asked_again_at_once() -> None:
    with NodeProcess() as node:
        async with client_of(node.address) as client:
            await put(client, [1])
            stop(node.process)
            client.deadline_s = 0.3
            asked = asyncio.ensure_future(client.exists([name(1)]))
            await asyncio.sleep(0)
            client.deadline_s = 1000.0  # for twice as long it would be left alone
            assert await asked == [None]
            assert await client.exists([name(1)]) == [None]
            assert client.failures["transfer_timeout"] == 1, "the second question was not even sent"
            node.process.send_signal(signal.SIGCONT)

            async def is_found() -> bool:
                return (await client.exists([name(1)])) != [None]

            await eventually(is_found)
