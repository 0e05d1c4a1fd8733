"""Which transports lead to a peer: opened by reach, nearest first, probed, and put aside for a while when they fail."""

from __future__ import annotations

import time

import numpy as np

from kvferry.errors import KVError, PeerGone, TransportClosed, TransportError
from kvferry.transfer.peer import Peer, Way
from kvferry.transport.base import BlockList, Link, Region, RemoteRegion, StopToken, Transport
from kvferry.transport.registry import find_transport

PROBE_BYTES = 64 << 10
STANDBY = "standby: opened when the nearer transports fail"
_NEAREST_FIRST = {"process": 0, "host": 1, "network": 2}


class Ways:
    """Opens and orders the ways to peers for one engine. All calls block; none is made on the event loop's thread."""

    def __init__(self, transports: dict[str, Transport], missing: dict[str, str], *, probe: Region | None) -> None:
        """
        Args:
            missing: schemes that were asked for but cannot work here, and why.
            probe: PROBE_BYTES that every transport exported, read into to measure a way; None to measure none.
        """
        self._transports, self._missing = transports, missing
        schemes = [*transports, *missing]
        self._schemes = sorted(schemes, key=lambda scheme: _NEAREST_FIRST[find_transport(scheme).reach])
        self._probe = probe

    def open(self, peer: Peer, deadline_s: float) -> None:
        """Try each transport; leave those that go farther than one that works on standby.

        Raises: TransportError if no transport leads to the peer; the message says why for each.
        """
        until_s = time.monotonic() + deadline_s
        with peer.opening:
            if peer.ways:
                return
            ways: list[Way] = []
            for scheme in self._schemes:
                near = any(way.link is not None for way in ways)
                if scheme in self._missing:
                    ways.append(Way(scheme, None, self._missing[scheme]))
                elif near and find_transport(scheme).reach == "network" and scheme in peer.offers:
                    ways.append(Way(scheme, None, STANDBY))
                else:
                    ways.append(self._open_one(peer, scheme, until_s - time.monotonic()))
            ways.sort(key=lambda way: (way.link is None, way.latency_us or 0.0))
            peer.ways = ways
        if peer.lost is not None:
            close_ways(peer)
            raise peer.lost
        if all(way.link is None for way in ways):
            reasons = "; ".join(f"{way.scheme}: {way.why}" for way in ways) or "no transport is configured"
            raise PeerGone(f"no transport leads to the peer: {reasons}", peer=peer.name)

    def best(
        self, peer: Peer, blocks: list[BlockList], *, writing: bool, deadline_s: float, tried: set[Way]
    ) -> Way | None:
        """The first open way that serves all these regions and was not tried; one that failed lately only if there is
        no other. None if there is none at all.

        Raises: as `open` does.
        """
        if not peer.ways:
            self.open(peer, deadline_s)
        failed_lately: Way | None = None
        for way in peer.ways:
            if way.link is None or way in tried or not _serves(way.scheme, blocks, writing):
                continue
            if way.usable():
                return way
            failed_lately = failed_lately or way
        return failed_lately

    def open_standby(self, peer: Peer, deadline_s: float) -> bool:
        """Open what was on standby; whether that brought a new way."""
        brought = False
        with peer.opening:
            for index, way in enumerate(peer.ways):
                if way.link is None and way.why is STANDBY:
                    peer.ways[index] = self._open_one(peer, way.scheme, deadline_s)
                    brought = brought or peer.ways[index].link is not None
        if peer.lost is not None:
            close_ways(peer)
            raise peer.lost
        return brought

    def _open_one(self, peer: Peer, scheme: str, deadline_s: float) -> Way:
        offer = peer.offers.get(scheme)
        if offer is None:
            return Way(scheme, None, "the peer does not offer it")
        try:
            link = self._transports[scheme].connect(
                offer, peer=peer.name, incarnation=peer.incarnation, deadline_s=max(0.01, deadline_s)
            )
        except (KVError, OSError, KeyError, ValueError, TypeError) as error:
            return Way(scheme, None, str(error) or type(error).__name__)
        link.regions = peer.regions
        way = Way(scheme, link, "reachable")
        if self._probe is not None:
            self._measure(peer, way, link, self._probe, deadline_s)
        return way

    def _measure(self, peer: Peer, way: Way, link: Link, local: Region, deadline_s: float) -> None:
        remote = peer.regions.get(0)
        if remote is None or way.scheme not in remote.handles:
            return
        try:
            way.latency_us = 1e6 * _fastest(link, remote, local, 4096, deadline_s)
            way.gbps = PROBE_BYTES / 1e9 / _fastest(link, remote, local, PROBE_BYTES, deadline_s)
            way.why = "reachable, probed"
        except TransportError as error:
            way.link, way.why = None, f"the probe failed: {error}"
            link.close()


def close_ways(peer: Peer, *, reason: KVError | None = None) -> None:
    """Close every link to the peer."""
    with peer.opening:
        for way in peer.ways:
            link, way.link = way.link, None
            if link is not None:
                way.why = str(reason or peer.lost or TransportClosed("closed"))
                link.close()


def _serves(scheme: str, blocks: list[BlockList], writing: bool) -> bool:
    reaches_gpus = scheme in ("cuda", "nixl")
    for source, target, *_ in blocks:
        remote, local = (target, source) if writing else (source, target)
        assert isinstance(remote, RemoteRegion)
        if scheme not in remote.handles or not (reaches_gpus or local.kind != "cuda"):
            return False
    return True


def _fastest(link: Link, remote: RemoteRegion, local: Region, nbytes: int, deadline_s: float) -> float:
    zero = np.zeros(1, dtype=np.int64)
    blocks = [BlockList(remote, local, zero, zero, nbytes)]
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        link.read(blocks, guard=None, stop=StopToken(), deadline_s=deadline_s)
        best = min(best, time.perf_counter() - began)
    return best
