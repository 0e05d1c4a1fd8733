"""Fixtures for tests with real vLLM on the CPU: models, a registry, one prefill/decode pair for a whole module."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = ROOT / ".vllm" / "models"
_FOUND = importlib.util.find_spec("vllm")
HAS_VLLM = _FOUND is not None and _FOUND.origin is not None  # this very folder may look like a package of that name


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            # The first test of a module waits for its servers: a minute on two idle cores, several on busy ones.
            item.add_marker(pytest.mark.timeout(600))
            if not HAS_VLLM:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed here: make test-vllm"))


@pytest.fixture(scope="session")
def model_path():
    """Gives a tiny checkpoint's folder by its name; made on first use."""

    def path(name):
        if not (MODELS / name / "tokenizer_config.json").exists():
            tool = ROOT / "tools" / "make_tiny_models.py"
            subprocess.run([sys.executable, str(tool), str(MODELS), name], check=True, timeout=300)
        return MODELS / name

    return path


@pytest.fixture(scope="module")
def registry():
    from serving import Registry

    registry = Registry()
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm-logs")


@pytest.fixture(scope="module")
def pool_node(logs):
    from serving import PoolNode

    node = PoolNode(logs)
    yield node
    node.stop()


@pytest.fixture(scope="module")
def start_pair(model_path, registry, logs):
    """Starts a pair (both at once) and waits until the registry knows both; stopped at the module's end."""
    from serving import Pair, Server, complete, kv_config, prompt_of, wait_for

    pairs = []

    def start(model, *, prefill_flags=(), decode_flags=(), prefill_kv=None, decode_kv=None, environment=None):
        prefill_kv = kv_config(registry, "P", **(prefill_kv or {}))
        decode_kv = kv_config(registry, "D", **(decode_kv or {}))
        path = model_path(model)
        prefill = Server("P", path, logs, flags=prefill_flags, kv=prefill_kv, environment=environment)
        decode = Server("D", path, logs, flags=decode_flags, kv=decode_kv, environment=environment)
        pairs.append(Pair(registry, prefill, decode))
        prefill.ready()
        decode.ready()
        for server in (prefill, decode):
            # The first forward compiles for seconds while it holds the interpreter: no handoff should wait for that.
            complete(server.url, prompt_of(700, seed=999_999), 2)
        wait_for(lambda: {"P", "D"} <= set(registry.reports), "both instances register")
        return pairs[-1]

    yield start
    for pair in pairs:
        pair.close()
