"""The pool: KV blocks that outlive the engines which computed them, in host memory and on disk, shared by all."""

from kvferry.observe.attachment import PoolStats
from kvferry.pool.attachment import PoolAttachment
from kvferry.pool.client import GetResult, PoolClient, PutResult
from kvferry.pool.cluster import PoolNodes
from kvferry.pool.keys import BlockSpace, Tier
from kvferry.pool.node import PoolNode
from kvferry.pool.parts import BlockPart, parts_of, whole
from kvferry.pool.pending import Loaded, Pending, Saved
from kvferry.pool.settings import PoolSettings

__all__ = [
    "BlockPart",
    "BlockSpace",
    "GetResult",
    "Loaded",
    "Pending",
    "PoolAttachment",
    "PoolClient",
    "PoolNode",
    "PoolNodes",
    "PoolSettings",
    "PoolStats",
    "PutResult",
    "Saved",
    "Tier",
    "parts_of",
    "whole",
]
