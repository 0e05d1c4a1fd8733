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


def require_usable(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuse what this connector cannot carry.

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
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        kinds = sorted({type(g.kv_cache_spec).__name__ for g in groups})
        raise CompatibilityError(
            f"this model has {len(groups)} KV cache groups ({', '.join(kinds)}); block ids are unique within a group "
            "only, and a failed load could not be recomputed: start vLLM with --disable-hybrid-kv-cache-manager, or do "
            "not use this model with handoffs"
        )
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise CompatibilityError(
            f"this model's KV cache is of kind {type(spec).__name__}, whose blocks vLLM frees while the prompt is "
            "computed: only full attention and MLA can be handed over; try --disable-hybrid-kv-cache-manager"
        )


def model_name(vllm_config: Any, settings: ConnectorSettings) -> str:
    """The name under which requests ask for the model."""
    served = getattr(vllm_config.model_config, "served_model_name", None)
    if isinstance(served, (list, tuple)):
        served = served[0] if served else None
    return settings.model or str(served or vllm_config.model_config.model)


def fingerprint_of(vllm_config: Any, kv_cache_config: Any, settings: ConnectorSettings) -> Fingerprint:
    """What both sides must agree on. Equal in both halves and on all ranks."""
    group = kv_cache_config.kv_cache_groups[0]
    spec = group.kv_cache_spec
    is_latent = type(spec).__name__ == "MLAAttentionSpec"
    model = vllm_config.model_config
    cache_dtype = vllm_config.cache_config.cache_dtype
    dtype = str(spec.dtype).removeprefix("torch.")
    return Fingerprint(
        model=model_name(vllm_config, settings),
        dtype=dtype if cache_dtype == "auto" else f"{dtype}/{cache_dtype}",
        block_size=spec.block_size,
        num_layers=len(group.layer_names),
        num_kv_heads=1 if is_latent else model.get_total_num_kv_heads(),
        head_size=spec.head_size,
        revision=model.revision or "",
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
