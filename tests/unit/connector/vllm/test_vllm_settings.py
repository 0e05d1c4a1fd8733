"""Version gate, settings, what is refused, and the counts."""

from types import SimpleNamespace

import pytest

from kvferry.connector.vllm import stats
from kvferry.connector.vllm.model import fingerprint_of, incarnation_of, prompt_identity, require_usable, windows_of
from kvferry.connector.vllm.settings import ConnectorSettings, settings_from_extra_config
from kvferry.connector.vllm.trace import Trace
from kvferry.connector.vllm.version import require_supported
from kvferry.errors import CompatibilityError, ConfigError
from kvferry.types import HandoffId, Outcome, Stage, TerminalState


@pytest.mark.parametrize("version", ["0.26.0", "0.30.1rc2", "0.32.0+cpu"])
def test_supported_versions(version):
    assert require_supported(version)[0] == 0


@pytest.mark.parametrize("version", ["0.25.9", "0.33.0", "1.0.0", "0.9.2", "dev"])
def test_other_versions_are_refused_and_the_right_ones_named(version):
    with pytest.raises(CompatibilityError, match=r"0\.26 to 0\.32"):
        require_supported(version)


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="'listne'; did you mean 'listen'"):
        settings_from_extra_config({"listne": "x"})


def test_a_value_of_the_wrong_type_names_its_key():
    with pytest.raises(ConfigError, match="lease_ttl_s"):
        settings_from_extra_config({"lease_ttl_s": "soon"})


def test_a_router_needs_the_servers_own_url():
    with pytest.raises(ConfigError, match="no url"):
        settings_from_extra_config({"router": "http://127.0.0.1:8000"})


def test_ranks_listen_side_by_side():
    fixed = ConnectorSettings(listen="tcp://127.0.0.1:7000")
    assert fixed.listen_at(2) == "tcp://127.0.0.1:7002"
    assert ConnectorSettings().listen_at(2) == "tcp://127.0.0.1:0"
    with pytest.raises(ConfigError, match="tcp://host:port"):
        ConnectorSettings(listen="127.0.0.1:7000").listen_at(0)


def test_secret_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("KVFERRY_CLUSTER_SECRET", raising=False)
    assert ConnectorSettings().secret() is None
    monkeypatch.setenv("KVFERRY_CLUSTER_SECRET", "open sesame")
    assert ConnectorSettings().secret() == b"open sesame"
    path = tmp_path / "secret"
    path.write_text("from a file\n")
    assert ConnectorSettings(secret_file=str(path)).secret() == b"from a file"
    path.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        ConnectorSettings(secret_file=str(path)).secret()


class FullAttentionSpec(SimpleNamespace):
    pass


class SlidingWindowSpec(SimpleNamespace):
    pass


class MambaSpec(SimpleNamespace):
    pass


def vllm_config(**changes):
    config = SimpleNamespace(
        speculative_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=1),
        model_config=SimpleNamespace(
            model="/models/m", served_model_name="m", revision=None, get_total_num_kv_heads=lambda: 8
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        kv_transfer_config=SimpleNamespace(engine_id="e"),
        instance_id="i",
    )
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def cache_config(*specs):
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=s, layer_names=["a", "b"]) for s in specs])


SPEC = FullAttentionSpec(block_size=16, dtype="torch.bfloat16", head_size=128)


WINDOW = SlidingWindowSpec(block_size=16, dtype="torch.bfloat16", head_size=128, sliding_window=64)
NEW, OLD = {"fails_requests": True, "has_pool": False}, {"fails_requests": False, "has_pool": False}


@pytest.mark.parametrize("vllm", [NEW, OLD, {"fails_requests": True, "has_pool": True}])
def test_a_plain_model_is_usable(vllm):
    require_usable(vllm_config(), cache_config(SPEC), **vllm)


@pytest.mark.parametrize("specs, windows", [((WINDOW, SPEC), (64, None)), ((WINDOW,), (64,)), ((SPEC,), (None,))])
def test_windows_are_usable_where_a_failed_load_can_be_told_by_its_request(specs, windows):
    require_usable(vllm_config(), cache_config(*specs), **NEW)
    assert windows_of(cache_config(*specs)) == windows


def test_sides_with_other_tables_have_other_fingerprints():
    seen = [
        fingerprint_of(vllm_config(), cache_config(*specs), ConnectorSettings()).kv_groups
        for specs in ((SPEC,), (WINDOW, SPEC), (SPEC, WINDOW), (WINDOW,))
    ]
    assert seen == ["", "window 64, all", "all, window 64", "window 64"]
    both = fingerprint_of(vllm_config(), cache_config(WINDOW, SPEC), ConnectorSettings())
    assert both.num_layers == 4


@pytest.mark.parametrize(
    "config, caches, vllm, named",
    [
        (vllm_config(speculative_config=object()), cache_config(SPEC), NEW, "speculative decoding"),
        (vllm_config(parallel_config=SimpleNamespace(pipeline_parallel_size=2)), cache_config(SPEC), NEW, "pipeline"),
        (
            vllm_config(parallel_config=SimpleNamespace(pipeline_parallel_size=1, data_parallel_size=2)),
            cache_config(SPEC),
            NEW,
            "2 data-parallel engines",
        ),
        (vllm_config(), cache_config(SPEC, WINDOW), OLD, "could not recompute a failed load.*disable-hybrid"),
        (vllm_config(), cache_config(WINDOW), OLD, "could not recompute a failed load"),
        (vllm_config(), cache_config(SPEC, WINDOW), {"fails_requests": True, "has_pool": True}, "the pool keeps none"),
        (vllm_config(), cache_config(SPEC, MambaSpec(block_size=16)), NEW, "MambaSpec: only full attention"),
        (
            vllm_config(),
            cache_config(SPEC, SlidingWindowSpec(block_size=32, sliding_window=64)),
            NEW,
            r"blocks of \[16, 32\] tokens",
        ),
    ],
)
def test_what_cannot_be_carried_is_refused(config, caches, vllm, named):
    with pytest.raises(CompatibilityError, match=named):
        require_usable(config, caches, **vllm)


def test_fingerprint_counts_heads_over_all_ranks():
    fingerprint = fingerprint_of(vllm_config(), cache_config(SPEC), ConnectorSettings())
    assert (fingerprint.model, fingerprint.dtype, fingerprint.num_layers) == ("m", "bfloat16", 2)
    assert (fingerprint.num_kv_heads, fingerprint.head_size, fingerprint.block_size) == (8, 128, 16)


def test_an_incarnation_is_one_life():
    first = incarnation_of(vllm_config())
    assert first == incarnation_of(vllm_config())
    assert first != incarnation_of(vllm_config(instance_id="j"))
    assert 0 < first < 1 << 63


def test_adapter_salt_and_images_make_another_prompt():
    plain = SimpleNamespace(lora_request=None, cache_salt=None, mm_features=[])
    others = [
        SimpleNamespace(lora_request=SimpleNamespace(lora_name="a"), cache_salt=None, mm_features=[]),
        SimpleNamespace(lora_request=None, cache_salt="a", mm_features=[]),
        SimpleNamespace(lora_request=None, cache_salt=None, mm_features=[SimpleNamespace(identifier="a")]),
    ]
    assert len({prompt_identity(r) for r in [plain, *others]}) == 4


def test_counts_add_up():
    total, one = stats.empty(), stats.empty()
    assert stats.is_empty(one)
    handoff = HandoffId("0" * 32)
    stats.count_outcome(one, Outcome(handoff, TerminalState.DELIVERED, bytes_moved=5, transport="shm"), 0)
    stats.count_outcome(one, Outcome(handoff, TerminalState.RECOMPUTED, Stage.WAITING, "peer_gone"), 39)
    stats.count_release(one, "acked")
    stats.add(total, one)
    stats.add(total, one)
    assert total["handoffs"] == {"delivered//": 2, "recomputed/waiting/peer_gone": 2}
    assert (total["bytes"], total["recomputed_tokens"], total["releases"]) == ({"shm": 10}, 78, {"acked": 2})
    assert not stats.is_empty(total)
    assert stats.summary(total)["prompt tokens recomputed"] == 78


def test_a_trace_is_one_line_a_moment_and_nothing_without_a_file(tmp_path):
    path = tmp_path / "trace.txt"
    Trace(None, "x")("r", "silent")
    trace = Trace(str(path), "worker-0")
    trace("r", "asked")
    trace.close()
    trace("r", "too late")
    seconds, who, request, what = path.read_text().split()
    assert (float(seconds) > 0, who, request, what) == (True, "worker-0", "r", "asked")
