"""What may use the pool, and what names its blocks."""

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import kvferry.connector.vllm
from kvferry.connector.vllm import stats
from kvferry.connector.vllm.pool import SEED_VARIABLE, pool_fingerprint, require_pool_usable, weights_sample
from kvferry.connector.vllm.settings import settings_from_extra_config
from kvferry.errors import CompatibilityError, ConfigError
from kvferry.layout import Fingerprint

FINGERPRINT = Fingerprint("m", "bfloat16", 16, 2, 2, 64)


def vllm_config(*, policy="recompute", algorithm="sha256", model="org/name"):
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        cache_config=SimpleNamespace(prefix_caching_hash_algo=algorithm),
        model_config=SimpleNamespace(model=model),
    )


def test_all_processes_start_their_hashes_alike(monkeypatch):
    monkeypatch.delenv(SEED_VARIABLE, raising=False)
    require_pool_usable(vllm_config())
    assert os.environ[SEED_VARIABLE] == "0"
    monkeypatch.setenv(SEED_VARIABLE, "7")
    require_pool_usable(vllm_config(algorithm="sha256_cbor"))
    assert os.environ[SEED_VARIABLE] == "7"


@pytest.mark.parametrize(
    ("config", "seed", "named"),
    [
        (vllm_config(policy="fail"), "0", 'set it to "recompute"'),
        (vllm_config(algorithm="xxhash"), "0", "sha256"),
        (vllm_config(), "random", "unset it"),
    ],
)
def test_what_would_give_wrong_or_no_hits_is_refused(monkeypatch, config, seed, named):
    monkeypatch.setenv(SEED_VARIABLE, seed)
    with pytest.raises(ConfigError, match=named):
        require_pool_usable(config)


def test_other_weights_under_the_same_name_are_another_model(tmp_path):
    def folder(name, seed):
        (tmp_path / name).mkdir()
        data = np.random.default_rng(seed).bytes(100_000)
        (tmp_path / name / "model.safetensors").write_bytes(data)
        return str(tmp_path / name)

    one, same, other = folder("one", 1), folder("elsewhere", 1), folder("other", 2)
    assert weights_sample(one) == weights_sample(same) != weights_sample(other)
    assert weights_sample("org/name") == "org/name"
    digests = {pool_fingerprint(vllm_config(model=m), FINGERPRINT).digest() for m in (one, same, other, "org/name")}
    assert len(digests) == 3


def test_hashes_made_otherwise_are_of_another_space():
    one, other = (pool_fingerprint(vllm_config(algorithm=a), FINGERPRINT) for a in ("sha256", "sha256_cbor"))
    assert one.digest() != other.digest()


def test_a_directory_needs_a_node():
    with pytest.raises(ConfigError, match="no pool"):
        settings_from_extra_config({"pool_directory": "redis://127.0.0.1:6379/0"})


def test_the_pools_figures_are_in_the_log_line():
    data = stats.empty()
    stats.count_label(data, stats.POOL_LOOKUPS, "hit")
    loaded = SimpleNamespace(num_blocks=2, nbytes=10, tiers={"host": 1, "disk": 1}, duration_s=0.004, cause=None)
    stats.count_load(data, loaded, 2)
    stats.count_load(data, loaded, 3)
    stats.count_saved(data, SimpleNamespace(stored=3, duplicates=0, refused=0, nbytes=15, cause=None))
    assert stats.summary(data) == {
        "pool lookups (hit)": 1,
        "pool loads (evicted)": 1,
        "pool loads (whole)": 1,
        "pool blocks loaded (disk)": 2,
        "pool blocks loaded (host)": 2,
        "pool blocks (stored)": 3,
        "median pool load (ms)": 4.0,
    }
    total = stats.empty()
    stats.add(total, data)
    stats.add(total, data)
    assert (total["pool_loaded_bytes"], total["pool_saved_blocks"]) == (40, {"stored": 6})


def test_an_unknown_vllm_is_refused_before_its_inside_is_imported(monkeypatch):
    version = ModuleType("vllm.version")
    version.__version__ = "0.33.0"
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.version", version)
    with pytest.raises(CompatibilityError, match=r"0\.33\.0.*0\.26 to 0\.32"):
        _ = kvferry.connector.vllm.KVFerryConnector
