"""What a transfer engine can be told."""

from __future__ import annotations

from kvferry.transport.registry import TransportSettings


class TransferSettings(TransportSettings, frozen=True, kw_only=True):
    """Settings of the engine and of its transports. Sizes in bytes, times in seconds.

    `worker_threads` bounds how many transfers run at once, `transfers_per_peer` how many of them with one peer, so
    that a stopped peer can't hold them all. `max_bytes_in_flight` bounds what running transfers move at once.
    """

    worker_threads: int = 8
    transfers_per_peer: int = 2
    max_bytes_in_flight: int = 4 << 30
    slice_bytes: int = 256 << 20
    max_unsent_bytes: int = 64 << 20
    handshake_s: float = 5.0
    suspend_s: float = 2.0
    probe: bool = True
