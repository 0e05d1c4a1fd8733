"""The routing policy and admission."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from kvferry.layout import Fingerprint
from kvferry.policy.admission import Admission, admit, retry_after_s
from kvferry.policy.routing import Candidate, Placement, choose

FINGERPRINT = Fingerprint(model="m", dtype="f", block_size=16, num_layers=1, num_kv_heads=1, head_size=8)
OTHER = Fingerprint(model="m", dtype="f", block_size=32, num_layers=1, num_kv_heads=1, head_size=8)


def made(name: str, load: int = 0, **fields: Any) -> Candidate:
    role = {"p": "prefill", "d": "decode", "b": "both"}[name[0]]
    return Candidate(name, 1, role, load, **{"addresses": ("tcp://h:1",), **fields})  # type: ignore[arg-type]


def pick(*candidates: Candidate, **options: Any) -> tuple[str | None, str, str] | None:
    placement: Placement | None = choose(candidates, **{"edge_ok": lambda p, d: True, **options})
    if placement is None:
        return None
    prefill = placement.prefill.instance_id if placement.prefill is not None else None
    return prefill, placement.decode.instance_id, placement.reason


def test_the_least_loaded_pair() -> None:
    assert pick(made("p0", 3), made("p1", 1), made("d0", 2), made("d1", 5)) == ("p1", "d0", "")


def test_equals_take_turns() -> None:
    candidates = [made("p0"), made("p1"), made("d0"), made("d1"), made("d2")]
    seen = Counter(pick(*candidates, turn=turn) for turn in range(60))
    assert {d for _, d, _ in (s for s in seen if s)} == {"d0", "d1", "d2"}
    assert {p for p, _, _ in (s for s in seen if s)} == {"p0", "p1"}
    assert max(seen.values()) == min(seen.values())


def test_nobody_to_decode() -> None:
    assert pick() is None
    assert pick(made("p0")) is None
    assert pick(made("p0"), made("d0"), excluded={"d0"}) is None


def test_no_prefill_instance_is_said() -> None:
    assert pick(made("d0")) == (None, "d0", "no_prefill_instance")
    assert pick(made("p0"), made("d0"), excluded={"p0"}) == (None, "d0", "no_prefill_instance")
    assert pick(made("p0", addresses=()), made("d0")) == (None, "d0", "no_prefill_instance")


def test_instances_of_both_roles() -> None:
    assert pick(made("b0", 2), made("b1", 1)) == (None, "b1", "one_instance")
    # With someone dedicated to prefill, it does the prefills.
    assert pick(made("b0"), made("p0")) == ("p0", "b0", "")
    # An instance is no partner of itself.
    assert pick(made("b0"), made("d0", 1)) == ("b0", "d0", "")
    assert pick(made("b0", 5), made("d0")) == ("b0", "d0", "")


def test_a_blocked_edge_is_routed_around() -> None:
    blocked = {("p0", "d0")}

    def edge_ok(prefill: Candidate, decode: Candidate) -> bool:
        return (prefill.instance_id, decode.instance_id) not in blocked

    pair = [made("p0"), made("p1", 9), made("d0"), made("d1", 9)]
    assert pick(*pair, edge_ok=edge_ok) == ("p1", "d0", "")
    # Another decode instance, even a busier one, is better than none to hand over to.
    assert pick(made("p0"), made("d0"), made("d1", 9), edge_ok=edge_ok) == ("p0", "d1", "")
    assert pick(made("p0"), made("d0"), edge_ok=edge_ok) == (None, "d0", "edge_blocked")


def test_fingerprints_must_fit() -> None:
    ours, theirs = made("p0", fingerprint=FINGERPRINT), made("d0", fingerprint=OTHER)
    assert pick(ours, theirs) == (None, "d0", "no_compatible_prefill_instance")
    assert pick(ours, made("p1", 9, fingerprint=OTHER), theirs) == ("p1", "d0", "")
    assert pick(ours, made("d0")) == ("p0", "d0", "")


def test_a_direct_request_takes_the_least_loaded_decoder() -> None:
    assert pick(made("p0"), made("d0", 2), made("d1"), direct_reason="n_above_one") == (None, "d1", "n_above_one")


@pytest.mark.parametrize(
    ("in_flight", "queued", "verdict"),
    [(0, 0, "start"), (3, 0, "start"), (4, 0, "wait"), (4, 1, "wait"), (3, 1, "wait"), (4, 2, "refuse")],
)
def test_admission(in_flight: int, queued: int, verdict: str) -> None:
    answer = admit(in_flight=in_flight, max_in_flight=4, queued=queued, max_queue=2, mean_request_s=0.0)
    assert answer == Admission(verdict, 1 if verdict == "refuse" else 0)  # type: ignore[arg-type]


def test_retry_after_follows_the_queue() -> None:
    assert retry_after_s(0, 4, 0.0) == 1
    assert retry_after_s(19, 4, 2.0) == 10
    assert retry_after_s(10_000, 4, 100.0) == 60
