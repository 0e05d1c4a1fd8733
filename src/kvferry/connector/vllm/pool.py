"""The pool as one vLLM instance sees it: what may use it, what names its blocks, and the attachments of both halves.

Reads vLLM's objects, imports nothing of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from kvferry.connector.vllm import layouts
from kvferry.connector.vllm.settings import ConnectorSettings
from kvferry.errors import ConfigError
from kvferry.layout import Fingerprint, KVLayout, LayerLayout
from kvferry.pool import BlockSpace, PoolAttachment

if TYPE_CHECKING:
    import torch

SEED_VARIABLE = "PYTHONHASHSEED"
SAVING_SHARE = 0.25
"""The part of all blocks that may wait to be saved at a time: they may not be reused meanwhile."""

_SAMPLES, _SAMPLE_BYTES = 16, 4096


def require_pool_usable(vllm_config: Any) -> None:
    """Refuse what the pool cannot serve, and see to it that vLLM's block hashes are equal in all processes.

    Must run before vLLM draws the seed of its hashes, which it does after it has made the scheduler's connector.

    Raises: ConfigError: says what was found and what to change.
    """
    policy = vllm_config.kv_transfer_config.kv_load_failure_policy
    if policy != "recompute":
        raise ConfigError(
            f"kv_load_failure_policy is {policy!r}, with which a block that left the pool too early ends its request "
            'with an error: set it to "recompute" in --kv-transfer-config to use a pool'
        )
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if not algorithm.startswith("sha256"):
        raise ConfigError(
            f"prefix_caching_hash_algo is {algorithm!r}, which is not collision resistant: in a pool, one prompt could "
            "be served another's KV; start vLLM with --prefix-caching-hash-algo sha256 (or sha256_cbor)"
        )
    if os.environ.get(SEED_VARIABLE) == "random":
        raise ConfigError(
            f"{SEED_VARIABLE} is 'random', with which every process names the same block otherwise and nothing would "
            "ever be found in the pool: unset it, or set it to the same number everywhere"
        )
    # Without it, vLLM 0.26 starts its hashes from random bytes of each process.
    os.environ.setdefault(SEED_VARIABLE, "0")


def pool_fingerprint(vllm_config: Any, fingerprint: Fingerprint) -> Fingerprint:
    """What blocks in the pool must share: they outlive this process, so the weights themselves are part of it."""
    model = vllm_config.model_config
    return msgspec.structs.replace(
        fingerprint,
        revision=f"{fingerprint.revision}/{weights_sample(model.model)}",
        hash_algorithm=f"vllm-{vllm_config.cache_config.prefix_caching_hash_algo}",
    )


def weights_sample(model: str) -> str:
    """A digest of samples of the weights, if `model` is a folder of safetensors; otherwise the name itself.

    Equal on all hosts that have the same files, whatever they call the folder. Reads 64 KiB of each file.
    """
    files = sorted(Path(model).glob("*.safetensors"))
    if not files:
        return model
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for at in np.linspace(0, max(0, size - _SAMPLE_BYTES), _SAMPLES, dtype=np.int64).tolist():
                file.seek(at)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def attach_memory(
    kv_caches: Mapping[str, torch.Tensor],
    geometry: layouts.Geometry,
    *,
    settings: ConnectorSettings,
    fingerprint: Fingerprint,
    wake: Callable[[], None],
) -> tuple[PoolAttachment, BlockSpace]:
    """This rank's KV memory attached to the pool, and what its blocks are there. The caller closes the attachment.

    Args:
        fingerprint: as `pool_fingerprint` made it.
        wake: called on the attachment's thread when a load or save has ended.
    Raises: ConfigError: a node of another host could not reach this one, or a package for CUDA is missing. KVError
        where the GPU or the system refuses.
    """
    storages = layouts.storages(kv_caches)
    layout = layouts.layout_of(kv_caches, geometry, {s.address: i for i, s in enumerate(storages)})
    space = BlockSpace.of(fingerprint, layout, settings.namespace)
    nbytes = layout.num_blocks * layout.block_bytes * len(layout.layers)
    buffers = {i: s.buffer for i, s in enumerate(storages)}
    attachment = _attach(
        space,
        layout,
        buffers,
        settings,
        deadline_s=settings.pool_deadline_s,
        max_saving_bytes=int(nbytes * SAVING_SHARE),
        staging_bytes=settings.pool_staging_bytes,
        wake=wake,
    )
    return attachment, space


def attach_lookup(space: BlockSpace, settings: ConnectorSettings) -> PoolAttachment:
    """An attachment that only looks up, for the scheduler's process, which has no KV memory."""
    no_memory = KVLayout(1, 1, 1, 1, (LayerLayout(0, 0, 1),))
    return _attach(space, no_memory, {0: np.zeros(1, dtype=np.uint8)}, settings, deadline_s=settings.pool_wait_s)


def _attach(
    space: BlockSpace, layout: KVLayout, buffers: Mapping[int, Any], settings: ConnectorSettings, **more: Any
) -> PoolAttachment:
    assert settings.pool is not None, "the settings name a pool"
    return PoolAttachment(
        [settings.pool],
        space,
        layout,
        buffers,
        secret=settings.secret(),
        directory=settings.pool_directory,
        listen=settings.listen,
        **more,
    )
