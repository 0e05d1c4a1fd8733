"""Moving blocks between processes: register memory, connect, read; transports are chosen and replaced underneath."""

from kvferry.transfer.engine import TransferEngine
from kvferry.transfer.peer import Completion, Peer, TransportChoice
from kvferry.transfer.settings import TransferSettings

__all__ = ["Completion", "Peer", "TransferEngine", "TransferSettings", "TransportChoice"]
