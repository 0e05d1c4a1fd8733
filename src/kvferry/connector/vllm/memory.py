"""This rank's handoff node over the KV memory that vLLM allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvferry.connector.vllm import layouts
from kvferry.connector.vllm.metadata import rank_incarnation
from kvferry.connector.vllm.settings import ConnectorSettings
from kvferry.errors import KVError
from kvferry.handoff.node import HandoffNode
from kvferry.layout import Fingerprint
from kvferry.protocol.lease import HandoffSettings
from kvferry.types import Incarnation

if TYPE_CHECKING:
    import torch


def open_node(
    kv_caches: Mapping[str, torch.Tensor],
    geometry: layouts.Geometry,
    *,
    settings: ConnectorSettings,
    fingerprint: Fingerprint,
    instance_id: str,
    incarnation: Incarnation,
    wake: Callable[[], None],
) -> HandoffNode:
    """Register the KV memory and start to listen. The caller closes the node.

    Args:
        kv_caches: layer name -> KV tensor, as vLLM allocated them.
        incarnation: the instance's; with several ranks each gets one made from it.
        wake: called on the node's thread when it has news.
    Raises:
        CompatibilityError: the tensors' layout cannot be copied by block.
        ConfigError: the port is taken; the message names the process that holds it.
    """
    rank, size = geometry.tp_rank, geometry.tp_size
    node = HandoffNode(
        instance_id=instance_id if size == 1 else f"{instance_id}/{rank}",
        fingerprint=fingerprint,
        listen=settings.listen_at(rank),
        advertise_host=settings.advertise_host,
        secret=settings.secret(),
        settings=HandoffSettings(lease_ttl_s=settings.lease_ttl_s, heartbeat_s=settings.heartbeat_s),
        transports=settings.transports,
        incarnation=rank_incarnation(incarnation, rank, size),
        digest=settings.digest,
        wake=wake,
    )
    region_ids = {s.address: node.register(s.buffer) for s in layouts.storages(kv_caches)}
    try:
        node.start(layouts.layout_of(kv_caches, geometry, region_ids))
    except KVError:
        node.close()
        raise
    return node
