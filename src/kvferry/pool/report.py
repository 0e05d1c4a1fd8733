"""A node's figures as text for a person."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.pool.messages import BlockStat, DrainState, NamespaceStat, NodeStat, SpaceStat

_SHOWN_APART = ("get_", "put_stored", "put_duplicates", "put_refused", "put_bytes")


def stat_text(stat: NodeStat) -> str:
    """What a node holds, serves and suffered."""
    used = stat.num_slabs - stat.free_slabs
    host = f"{used} of {stat.num_slabs} slabs of {size_text(stat.slab_bytes)} in use"
    disk = f"{stat.blocks_on_disk} of {stat.disk_slots} slots in use, {size_text(stat.disk_queued_bytes)} queued"
    counts = stat.counts
    hits = counts.get("get_host", 0) + counts.get("get_disk", 0)
    asked, put = hits + counts.get("get_missed", 0), counts.get("put_stored", 0) + counts.get("put_duplicates", 0)
    rows = [
        ("node", f"{stat.address}, {stat.state}"),
        ("host", f"{host}; {stat.replicas} copies of other nodes' blocks"),
        ("disk", disk if stat.disk_slots else "none"),
        ("gets", f"{asked} blocks: {counts.get('get_host', 0)} from host, {counts.get('get_disk', 0)} from disk, "
                 f"{counts.get('get_missed', 0)} missed{_share(hits, asked, ' ({} hit)')}"),
        ("puts", f"{put} blocks: {counts.get('put_stored', 0)} stored, {counts.get('put_duplicates', 0)} there already"
                 f"{_share(counts.get('put_duplicates', 0), put, ' ({} dedup)')}, "
                 f"{counts.get('put_refused', 0)} refused"),
        ("bytes", f"{size_text(counts.get('put_bytes', 0))} in, {size_text(counts.get('get_bytes', 0))} out"),
        ("latency", _latencies(stat.latencies_ms)),
        ("leases", str(stat.leases)),
    ]  # fmt: skip
    lines = [f"{name:<9}{text}" for name, text in rows]
    others = {name: count for name, count in sorted(counts.items()) if count and not name.startswith(_SHOWN_APART)}
    if others:
        lines += ["", "events"] + [f"  {name:<26}{count:>10}" for name, count in others.items()]
    return "\n".join([*lines, "", namespaces_text(stat.namespaces)] if stat.namespaces else lines)


def namespaces_text(namespaces: Sequence[NamespaceStat]) -> str:
    """One line a namespace."""
    head = ("namespace", "host", "quota", "hits", "hit rate", "stored", "dedup", "refused", "in", "out")
    rows = [
        (
            n.namespace,
            size_text(n.host_bytes),
            "-" if n.quota_bytes is None else size_text(n.quota_bytes),
            str(n.got_host + n.got_disk),
            _share(n.got_host + n.got_disk, n.got_host + n.got_disk + n.missed, "{}") or "-",
            str(n.stored),
            _share(n.duplicates, n.stored + n.duplicates, "{}") or "-",
            str(n.refused),
            size_text(n.bytes_in),
            size_text(n.bytes_out),
        )
        for n in namespaces
    ]
    return table([head, *rows])


def spaces_text(spaces: Sequence[SpaceStat]) -> str:
    """One line a space."""
    head = ("namespace", "fingerprint", "blocks", "host")
    return table([head, *((s.namespace, s.fingerprint[:16], str(s.blocks), size_text(s.host_bytes)) for s in spaces)])


def blocks_text(blocks: Sequence[BlockStat]) -> str:
    """One line a block."""
    head = ("block", "fingerprint", "tier", "served", "depth", "size", "pins", "copy")
    rows = [
        (b.block_hash[:16], b.fingerprint[:16], b.tier, str(b.reuses), str(b.depth), size_text(b.nbytes), str(b.pins),
         "yes" if b.copy else "-")
        for b in blocks
    ]  # fmt: skip
    return table([head, *rows])


def drain_text(state: DrainState) -> str:
    """How far a drain is."""
    text = f"{state.copied} of {state.hot} hot blocks are on other nodes"
    if not state.ended:
        return text
    if state.left:
        return f"{text}; {state.left} are left here ({state.ended}); the node has left the directory"
    return f"{text}; the node has left the directory and may be ended"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns wide enough for what is in them: the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
             for row in rows)  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def size_text(nbytes: int) -> str:
    """1536 as `1.5 KiB`."""
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _share(part: int, whole: int, text: str) -> str:
    return text.format(f"{100 * part / whole:.1f} %") if whole else ""


def _latencies(found: dict[str, float]) -> str:
    texts = [
        f"{what} p50 <= {found[f'{what}_p50']:g} ms, p99 <= {found[f'{what}_p99']:g} ms"
        for what in ("get", "put")
        if f"{what}_p50" in found
    ]
    return "; ".join(texts) or "nothing asked yet"
