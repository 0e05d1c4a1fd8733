"""Each fault of the catalogue is named first and nothing false is said; healthy clusters give no finding at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from catalogue import every, score
from catalogue.bench import Bench, can_make_namespaces, fields
from catalogue.table import FAULTS, HEALTHY, Fault
from kvferry.doctor import findings, live, passage, pool, reach, rendezvous

NAMESPACES = can_make_namespaces()
assert every


SILENCE = {"KVF023", "KVF032", "KVF051", "KVF090", "KVF093", "KVF100", "KVF114", "KVF120", "KVF121", "KVF122", "KVF123"}
"""What is found because nobody answers: the doctor's patience is what these faults cost."""

PATIENCE_S = 30.0


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers is waited for: a process may get no CPU for seconds."""
    for module, names in (
        (reach, ("CONNECT_S", "ANSWER_S", "HEALTH_S")),
        (live, ("ASK_S",)),
        (passage, ("CONNECT_S", "REQUEST_S")),
        (rendezvous, ("CONNECT_S",)),
        (pool, ("ASK_S",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, PATIENCE_S)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_cluster_gives_no_finding(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if HEALTHY[name].needs == "root" and not NAMESPACES:
        pytest.skip("needs root, ip, nsenter, unshare and /dev/net/tun")
    be_patient(monkeypatch)
    with Bench(tmp_path) as bench:
        said = HEALTHY[name].build(bench)
    assert fields(said) == []


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_the_doctor_names_the_fault_first_and_nothing_false(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault.needs == "root" and not NAMESPACES:
        pytest.skip("needs root, ip, nsenter, unshare and /dev/net/tun")
    if fault.expected not in SILENCE:
        be_patient(monkeypatch)
    with Bench(tmp_path) as bench:
        said = fault.build(bench)
    assert said, "nothing was found"
    assert said[0].id == fault.expected, fields(said)
    assert {f.id for f in said} <= {fault.expected, *fault.also}, fields(said)


def test_the_table_in_the_docs_is_the_catalogue() -> None:
    assert score.DOCS.read_text() == score.table(), "run: python tests/faults/catalogue/score.py --write"


def test_every_finding_has_a_fault_that_shows_it() -> None:
    assert set(findings.catalogue()) == {f.expected for f in FAULTS.values()}
