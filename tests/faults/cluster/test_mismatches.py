"""Instances that must not be paired: each is refused with both values, and the answer is computed by decode alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from live import Live

from kvferry.connector.transformers.random_model import write_random_model
from kvferry.layout import PROTOCOL_VERSION
from kvferry.types import Role

pytestmark = [pytest.mark.leaks_allowed, pytest.mark.timeout(300)]
PREFILL: Role = "prefill"
OTHER_VERSION = (
    "import kvferry.layout as layout; layout.PROTOCOL_VERSION = 99; from kvferry.cli import main; main(['engine'])"
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One decode instance, and four prefill instances that differ from it in one thing each."""
    other_model = write_random_model(tmp_path_factory.mktemp("model") / "other")
    live = Live(0, 1)
    try:
        live.add("prefill-blocks", PREFILL, KVFERRY_ENGINE_BLOCK_SIZE="32")
        live.add("prefill-dtype", PREFILL, KVFERRY_ENGINE_DTYPE="bfloat16")
        named = {"KVFERRY_ENGINE_MODEL": str(other_model), "KVFERRY_ENGINE_SERVED_MODEL_NAME": "kvferry-demo"}
        live.add("prefill-model", PREFILL, **named)
        live.add("prefill-version", PREFILL, sys.executable, "-c", OTHER_VERSION)
        live.wait(lambda: len(live.instances()) == 5, 120.0, lambda: f"five instances: {live.instances()}")
        yield live
    finally:
        live.close()


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("prefill-blocks", "block_size: here 32, there 16"),
        ("prefill-dtype", "dtype: here 'bfloat16', there 'float32'"),
        ("prefill-model", "num_layers: here 2, there 6"),
    ],
)
def test_what_does_not_fit_is_named_with_both_values_where_it_registers(live: Live, name: str, seen: str) -> None:
    rows = {row.instance_id: row for row in live.instances()}
    assert any(seen in text and "[peer decode-0" in text for text in rows[name].mismatches), rows[name]
    log = "\n".join(live.child("router").tail(200))
    assert "instances cannot be paired" in log and seen in log


def test_another_protocol_version_is_refused_by_the_handshake(live: Live) -> None:
    """The router can't tell it apart; its peers do, before anything is sent."""
    prompt = "Which version is this?"
    answer = live.ask(prompt)
    assert answer.tokens == live.reference(prompt)
    assert (answer.state, answer.cause) == ("recomputed", "compatibility_error"), answer
    (record,) = [record for record in live.recent() if record.prefill == "prefill-version"]
    assert f"kvferry protocol version here 99, there {PROTOCOL_VERSION}" in (record.detail or "")


def test_nothing_that_does_not_fit_is_ever_paired(live: Live) -> None:
    live.leave("prefill-version")
    prompt = "Who may help whom?"
    answer = live.ask(prompt)
    assert answer.tokens == live.reference(prompt)
    assert answer.outcome == "recomputed; stage=queue; cause=no_compatible_prefill_instance; path=direct"
    live.require_idle()
