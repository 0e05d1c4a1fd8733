"""kvferry as a KV connector of real, unmodified vLLM (0.26 to 0.32).

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "KVFerryConnector",
        "kv_connector_module_path": "kvferry.connector.vllm", "kv_role": "kv_producer",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"router": "http://127.0.0.1:8000", "url": "http://127.0.0.1:8100"}}'

Rooms: `scheduler.py` decides (`requests.py` is what it knows of each), `worker.py` acts, `metadata.py` is what crosses
between them; `layouts.py` maps vLLM's tensors, `stream.py` waits for the device, `pace.py` says how early to publish,
`stats.py` and `metrics.py` count, `registration.py` joins the router, `version.py` and `settings.py` refuse what is not
understood. For the pool, `pool_scheduler.py` and `pool_worker.py` do what the halves do for handoffs, and `pool.py`
attaches it. `connector.py` is the thin class that vLLM calls; it alone (with `seams.py` and `metrics.py`) imports vLLM,
so that all decisions are tested without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvferry.connector.vllm.connector import KVFerryConnector

__all__ = ["KVFerryConnector"]


def __getattr__(name: str) -> Any:
    if name != "KVFerryConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.version import __version__

    from kvferry.connector.vllm.version import require_supported

    # Before the first import from vLLM's inside, which another version may lay out differently.
    require_supported(__version__)
    from kvferry.connector.vllm.connector import KVFerryConnector

    return KVFerryConnector
