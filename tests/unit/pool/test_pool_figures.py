"""A node's figures: by namespace, capped; quantiles; and what Prometheus and a person see of them."""

from __future__ import annotations

from kvferry.observe import PoolReading
from kvferry.pool.figures import MAX_NAMESPACES, OTHERS, Figures
from kvferry.pool.messages import DrainState, NodeStat
from kvferry.pool.report import drain_text, namespaces_text, size_text, stat_text


def test_gets_and_puts_are_counted_by_namespace() -> None:
    figures = Figures()
    figures.got("a", host=3, disk=1, missed=4, nbytes=400, seconds=0.002)
    figures.put("a", stored=6, duplicates=2, refused=1, nbytes=600, seconds=0.02)
    figures.got("b", host=0, disk=0, missed=1, nbytes=0, seconds=0.002)
    body, content_type = figures.render(PoolReading(events={"evictions": 5}, slabs={"used": 3, "free": 1}, leases=2))
    text = body.decode()
    assert content_type.startswith("text/plain")
    for line in (
        'kvferry_pool_blocks_got_total{namespace="a",tier="host"} 3.0',
        'kvferry_pool_blocks_got_total{namespace="a",tier="disk"} 1.0',
        'kvferry_pool_blocks_got_total{namespace="b",tier="miss"} 1.0',
        'kvferry_pool_blocks_put_total{namespace="a",result="duplicate"} 2.0',
        'kvferry_pool_bytes_total{direction="out",namespace="a"} 400.0',
        'kvferry_pool_events_total{event="evictions"} 5.0',
        'kvferry_pool_slabs{use="free"} 1.0',
        "kvferry_pool_leases 2.0",
        "kvferry_pool_get_seconds_count 2.0",
    ):
        assert line in text.splitlines()
    a, b = figures.namespaces({"a": 4096}, {"a": 8192})
    assert (a.host_bytes, a.quota_bytes, a.got_host, a.stored, a.bytes_in) == (4096, 8192, 3, 6, 600)
    assert (b.namespace, b.quota_bytes, b.missed) == ("b", None, 1)
    assert figures.latencies_ms() == {"get_p50": 2.5, "get_p99": 2.5, "put_p50": 25.0, "put_p99": 25.0}


def test_namespaces_without_number_fill_no_monitoring_system() -> None:
    figures = Figures()
    for number in range(MAX_NAMESPACES + 50):
        figures.got(f"tenant-{number}", host=1, disk=0, missed=0, nbytes=1, seconds=0.001)
    figures.got("tenant-0", host=1, disk=0, missed=0, nbytes=1, seconds=0.001)
    assert len(figures.by_namespace) == MAX_NAMESPACES + 1
    assert figures.by_namespace[OTHERS]["got_host"] == 50
    assert figures.by_namespace["tenant-0"]["got_host"] == 2


def test_a_person_reads_the_figures_in_words() -> None:
    figures = Figures()
    figures.got("team-a", host=3, disk=0, missed=1, nbytes=3 << 20, seconds=0.002)
    figures.put("team-a", stored=3, duplicates=1, refused=0, nbytes=3 << 20, seconds=0.02)
    stat = NodeStat(
        id=1,
        address="tcp://h:1",
        num_slabs=10,
        free_slabs=7,
        slab_bytes=1 << 20,
        disk_slots=0,
        blocks_on_disk=0,
        disk_queued_bytes=0,
        leases=0,
        replicas=0,
        state="serving",
        counts={**figures.counts, "evictions": 2},
        latencies_ms=figures.latencies_ms(),
        namespaces=figures.namespaces({"team-a": 3 << 20}, {}),
        spaces=[],
    )
    text = stat_text(stat)
    assert "3 of 10 slabs of 1.0 MiB in use" in text
    assert "gets     4 blocks: 3 from host, 0 from disk, 1 missed (75.0 % hit)" in text
    assert "(25.0 % dedup)" in text
    assert "evictions" in text
    header, row = namespaces_text(stat.namespaces).splitlines()
    assert len(header) == len(row)
    assert row.split()[:3] == ["team-a", "3.0", "MiB"]


def test_sizes_and_drains_in_words() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 5 << 40)] == ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
    assert drain_text(DrainState(1, 4, 2, 0, "")) == "2 of 4 hot blocks are on other nodes"
    assert "may be ended" in drain_text(DrainState(1, 4, 4, 0, "all copied"))
    assert "1 are left here (why)" in drain_text(DrainState(1, 4, 3, 1, "why"))
