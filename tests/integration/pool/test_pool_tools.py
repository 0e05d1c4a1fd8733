"""What a person and a monitoring system see of nodes that run: `kvferry pool ...` and `/metrics`."""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from kvferry.cli import main
from kvferry.pool import BlockSpace, PoolNode, PoolSettings
from kvferry.pool.metrics_server import MetricsServer
from pool_processes import SPACE, NodeProcess, RedisServer, client_of, get, name, put, redis_server

OTHER = BlockSpace(SPACE.fingerprint, "tenant-b")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    pytest.importorskip("redis")
    with redis_server(tmp_path) as server:
        yield server


async def use(address: str, space: BlockSpace = SPACE) -> None:
    """Five blocks, three of them hot, one put twice."""
    async with client_of(address, space) as client:
        await put(client, [1, 2, 3, 4, 5])
        await put(client, [1])
        await get(client, [1, 2, 3, 99])


def test_figures_of_a_node_for_a_person_and_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    with NodeProcess("--arena-bytes", "4MiB", "--quotas", "tenant-b=1MiB") as node:
        asyncio.run(use(node.address))
        asyncio.run(use(node.address, OTHER))
        assert main(["pool", "stat", "--node", node.address]) == 0
        text = capsys.readouterr().out
        assert f"node     {node.address}, serving" in text
        assert "gets     8 blocks: 6 from host, 0 from disk, 2 missed (75.0 % hit)" in text
        assert "puts     12 blocks: 10 stored, 2 there already (16.7 % dedup), 0 refused" in text
        rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("tenant")}
        assert rows["tenant-b"][1:6] == ["320.0", "KiB", "1.0", "MiB", "3"]
        assert main(["pool", "stat", "--node", node.address, "--json"]) == 0
        stat = msgspec.json.decode(capsys.readouterr().out)
        assert (stat["state"], stat["counts"]["put_stored"], len(stat["namespaces"])) == ("serving", 10, 2)
        assert main(["pool", "ls", "--node", node.address, "--namespace", "tenant-a", "--limit", "3", "--json"]) == 0
        blocks = [msgspec.json.decode(line) for line in capsys.readouterr().out.splitlines()]
        assert {block["block_hash"] for block in blocks} == {name(n).hex() for n in (1, 2, 3)}
        assert all((block["reuses"], block["tier"], block["copy"]) == (1, "host", False) for block in blocks)
        assert main(["pool", "drain", "--node", node.address]) == 2
        assert "has no directory" in capsys.readouterr().err
        assert main(["pool", "drain", "--node", node.address, "--deadline", "soon"]) == 2
        assert "--deadline 'soon'" in capsys.readouterr().err


@pytest.mark.redis
def test_drain_and_clear_reach_the_other_nodes(server: RedisServer, capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        flags = ("--arena-bytes", "4MiB", "--directory", server.url, "--max-copies", "1")
        one, two = (stack.enter_context(NodeProcess(*flags)) for _ in range(2))
        asyncio.run(use(one.address))
        asyncio.run(use(two.address, OTHER))
        # The node that is asked has no block of this tenant.
        assert main(["pool", "clear", "--node", one.address, "--only", "tenant-b"]) == 0
        assert capsys.readouterr().out == "5 blocks of 1 spaces removed\n"
        assert main(["pool", "drain", "--node", one.address, "--deadline", "20s"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == (
            "3 of 3 hot blocks are on other nodes; the node has left the directory and may be ended"
        )
        assert main(["pool", "drain", "--node", one.address, "--json"]) == 0
        assert msgspec.json.decode(capsys.readouterr().out) == {
            "hot": 3,
            "copied": 3,
            "left": 0,
            "ended": "all copied",
        }
        assert main(["pool", "ls", "--node", two.address]) == 0
        assert capsys.readouterr().out.splitlines()[1].split()[0] == "tenant-a"

        # Nobody is left to take what this one has.
        async def use_again() -> None:
            async with client_of(two.address) as client:
                await get(client, [1, 2, 3])

        asyncio.run(use_again())
        assert main(["pool", "drain", "--node", two.address, "--deadline", "20s"]) == 1
        assert "3 are left here (no other node takes more)" in capsys.readouterr().out


def test_metrics_are_served_over_http(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stderr, NodeProcess("--metrics-port", "0", "--log-level", "info", stderr=stderr) as node:
        asyncio.run(use(node.address))
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", log.read_text())
        assert found is not None
        with urllib.request.urlopen(found.group(), timeout=10) as answer:
            assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
            lines = answer.read().decode().splitlines()
    assert 'kvferry_pool_blocks_got_total{namespace="tenant-a",tier="host"} 3.0' in lines
    assert 'kvferry_pool_blocks_got_total{namespace="tenant-a",tier="miss"} 1.0' in lines
    assert 'kvferry_pool_blocks_put_total{namespace="tenant-a",result="duplicate"} 1.0' in lines
    assert "kvferry_pool_get_seconds_count 1.0" in lines
    assert "kvferry_pool_draining 0.0" in lines


async def test_a_taken_metrics_port_names_its_holder() -> None:
    node = PoolNode(settings=PoolSettings(arena_bytes=1 << 20, slab_bytes=65536))
    first = MetricsServer(node.metrics, "127.0.0.1", 0)
    url = await first.start()
    port = int(url.rpartition(":")[2].partition("/")[0])
    second = MetricsServer(node.metrics, "127.0.0.1", port)
    try:
        with pytest.raises(Exception, match=f"pool.metrics_port: port {port} on 127.0.0.1 is taken"):
            await second.start()
    finally:
        await second.close()
        await first.close()
        await node.close()
