"""What of vLLM's configuration concerns a handoff: the fingerprint, the identity of a life, what is refused.

Reads vLLM's objects, imports nothing of it.
"""

from __future__ import annotations

import hashlib
from typing import Any

from kvferry.connector.vllm.settings import ConnectorSettings
from kvferry.errors import CompatibilityError
from kvferry.layout import Fingerprint
from kvferry.types import Incarnation, Role

ROLES: dict[str, Role] = {"kv_producer": "prefill", "kv_consumer": "decode", "kv_both": "both"}


def require_usable(vllm_config: Any, kv_cache_config: Any, *, fails_requests: bool, has_pool: bool) -> None:
    """Refuse what this connector cannot carry.

    Args:
        fails_requests: this vLLM can be told that a request's load failed, not only which blocks' did.
        has_pool: the instance takes part in a pool.
    Raises: CompatibilityError: says what was found and what to change.
    """
    if vllm_config.speculative_config is not None:
        raise CompatibilityError(
            "speculative decoding is on, but kvferry does not hand over a draft model's KV: start vLLM without "
            "--speculative-config on instances that take part in handoffs"
        )
    parallel = vllm_config.parallel_config
    sizes = {
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": getattr(parallel, "decode_context_parallel_size", 1),
        "prefill_context_parallel_size": getattr(parallel, "prefill_context_parallel_size", 1),
    }
    for name, size in sizes.items():
        if size != 1:
            raise CompatibilityError(
                f"{name} is {size}, but kvferry hands over tensor-parallel ranks only: set it to 1"
            )
    if getattr(parallel, "data_parallel_size", 1) != 1 and not getattr(parallel, "data_parallel_external_lb", False):
        raise CompatibilityError(
            f"{parallel.data_parallel_size} data-parallel engines share one server, so that no request can be sent to "
            "the one that holds its KV: start a server for each, with --data-parallel-external-lb"
        )
    _require_groups(kv_cache_config.kv_cache_groups, fails_requests=fails_requests, has_pool=has_pool)


WINDOWED = "SlidingWindowSpec"
WHOLE = ("FullAttentionSpec", "MLAAttentionSpec")
ONE_TABLE = "start vLLM with --disable-hybrid-kv-cache-manager, which models that merely mix window sizes allow"


def _require_groups(groups: Any, *, fails_requests: bool, has_pool: bool) -> None:
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    unknown = sorted(set(kinds) - {WINDOWED, *WHOLE})
    if unknown:
        raise CompatibilityError(
            f"this model's KV cache is of kind {', '.join(unknown)}: only full attention, MLA and sliding windows are "
            f"blocks of tokens that can be handed over; {ONE_TABLE}, or do not use this model with kvferry"
        )
    if len(groups) == 1 and kinds[0] in WHOLE:
        return
    what = f"this model has {len(groups)} KV cache group(s) ({', '.join(kinds)})"
    if not fails_requests:
        raise CompatibilityError(
            f"{what}; block ids are unique within a group only, and this version of vLLM could not recompute a failed "
            f"load: {ONE_TABLE}, or use vLLM 0.32"
        )
    if has_pool:
        raise CompatibilityError(
            f"{what}, of which the pool keeps none: {ONE_TABLE}, or leave out `pool` in kv_connector_extra_config"
        )
    sizes = sorted({group.kv_cache_spec.block_size for group in groups})
    if len(sizes) != 1:
        raise CompatibilityError(f"{what} with blocks of {sizes} tokens; they must be alike: {ONE_TABLE}")


def windows_of(kv_cache_config: Any) -> tuple[int | None, ...]:
    """For each KV cache group the tokens of its sliding window; None where vLLM keeps all blocks."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return tuple(int(spec.sliding_window) if type(spec).__name__ == WINDOWED else None for spec in specs)


def model_name(vllm_config: Any, settings: ConnectorSettings) -> str:
    """The name under which requests ask for the model."""
    served = getattr(vllm_config.model_config, "served_model_name", None)
    if isinstance(served, (list, tuple)):
        served = served[0] if served else None
    return settings.model or str(served or vllm_config.model_config.model)


def fingerprint_of(vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> Fingerprint:
    """What both sides must agree on. Equal in both halves and on all ranks."""
    groups, windows = kv_cache_config.kv_cache_groups, windows_of(kv_cache_config)
    spec = groups[0].kv_cache_spec
    is_latent = type(spec).__name__ == "MLAAttentionSpec"
    model = vllm_config.model_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    dtype = str(spec.dtype).removeprefix("torch.")
    return Fingerprint(
        model=model_name(vllm_config, settings),
        dtype=dtype if cache_dtype == "auto" else f"{dtype}/{cache_dtype}",
        block_size=spec.block_size,
        num_layers=sum(len(group.layer_names) for group in groups),
        num_kv_heads=1 if is_latent else model.get_total_num_kv_heads(),
        head_size=spec.head_size,
        revision=model.revision or "",
        kv_groups="" if windows == (None,) else ", ".join("all" if w is None else f"window {w}" for w in windows),
    )


def incarnation_of(vllm_config: Any) -> Incarnation:
    """One number for this life of the instance, the same in all its processes.

    vLLM draws `engine_id` (unless it is set by hand) and `instance_id` at its start and passes both to its processes.
    """
    engine_id = vllm_config.kv_transfer_config.engine_id
    life = f"{engine_id}\0{vllm_config.instance_id}".encode()
    return Incarnation(int.from_bytes(hashlib.sha256(life).digest()[:8], "little") >> 1 | 1)


def prompt_identity(request: Any) -> str:
    """What makes equal prompt tokens different prompts: adapter, salt, images."""
    lora = getattr(request, "lora_request", None)
    features = getattr(request, "mm_features", None) or []
    parts = [lora.lora_name if lora is not None else "", getattr(request, "cache_salt", None) or ""]
    return "\0".join(parts + [str(getattr(f, "identifier", f)) for f in features])
