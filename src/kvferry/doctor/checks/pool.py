"""The KV pool as instances are configured with it: its nodes, their secret and slabs, its directory."""

from __future__ import annotations

from collections.abc import Iterator

from kvferry.doctor.case import Case
from kvferry.doctor.findings import Finding, found


def nodes(case: Case) -> Iterator[Finding]:
    """KVF090, KVF091, KVF092: a node that is not there or says nothing, has another secret, or too small slabs."""
    for answer in case.facts.pool:
        seen = f"{answer.side}: pool node {answer.address}"
        if answer.outcome == "absent":
            yield found(
                "KVF090",
                f"{seen} cannot be reached ({answer.detail})",
                f"start it (kvferry node --listen {answer.address}), or correct the pool of {answer.side}",
            )
        elif answer.outcome == "silent" and answer.stopped_owner:
            pid = answer.stopped_owner.rpartition(" ")[2].rstrip(")")
            yield found(
                "KVF090",
                f"{seen} takes connections and does not answer: {answer.stopped_owner} is stopped",
                f"continue it: kill -CONT {pid}, or start it again",
            )
        elif answer.outcome == "silent":
            yield found(
                "KVF090",
                f"{seen} takes connections and does not answer as a node of the pool ({answer.detail})",
                f"see what listens there (ss -ltnp), and name the node's own address in the pool of {answer.side}",
            )
        elif answer.outcome == "secret":
            yield found(
                "KVF091",
                f"{seen}: {answer.detail}",
                f"give {answer.side} and the node the same KVFERRY_CLUSTER_SECRET, and start them again",
            )
        elif answer.block_bytes is not None and answer.block_bytes > answer.slab_bytes:
            yield found(
                "KVF092",
                f"{seen} has slabs of {answer.slab_bytes:,} bytes, a block of {answer.side} has "
                f"{answer.block_bytes:,} or more",
                f"start the node with --slab-bytes {answer.block_bytes} or more, or {answer.side} with a smaller "
                "--block-size",
            )


def directory(case: Case) -> Iterator[Finding]:
    """KVF093: the directory that nodes and engines find blocks of other hosts in."""
    for reach in case.facts.reaches:
        kind, _, what = reach.purpose.partition(" ")
        if kind != "pool-directory" or not (case.inside or reach.outcome == "refused"):
            continue
        where = f"{reach.seen_from}: {what} {reach.host}:{reach.port}"
        if reach.outcome != "open":
            trouble = {"refused": "refuses connections", "unresolved": "does not resolve"}.get(reach.outcome)
            seen = f"{where} {trouble or 'cannot be reached (' + reach.outcome + ')'}"
        elif reach.stopped_owner:
            seen = f"{where} takes connections but does not answer: {reach.stopped_owner} is stopped"
        elif reach.answer == "silent":
            seen = f"{where} takes connections and answers nothing: it hangs, or its container is paused"
        elif reach.answer == "closed":
            seen = f"{where} should be Redis, but it closes connections without an answer"
        elif reach.answer not in ("", "ok"):
            seen = f"{where} should be Redis, but it answered {reach.answer!r}"
        else:
            continue
        mend = f"start it (redis-server --bind {reach.host} --port {reach.port}), or correct {what}"
        yield found("KVF093", seen, mend)
