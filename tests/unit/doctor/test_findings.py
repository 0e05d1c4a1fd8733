"""The table of findings, its pages, and the code that speaks of them fit each other."""

from __future__ import annotations

import re
from pathlib import Path

from kvferry.doctor.findings import catalogue, found, in_order
from kvferry.doctor.log_rules import rules
from kvferry.doctor.pages import pages

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs" / "findings"


def test_each_finding_has_its_page_and_each_page_its_finding() -> None:
    written = {p.name: p.read_text() for p in DOCS.glob("*.md")}
    assert written == pages(), "run: python -m kvferry.doctor.pages docs/findings"


def test_each_finding_can_be_made_and_each_that_is_made_is_in_the_table() -> None:
    made = {rule.finding for rule, _ in rules() if rule.finding}
    for module in (ROOT / "src" / "kvferry" / "doctor" / "checks").glob("*.py"):
        for line in module.read_text().splitlines():
            if not line.lstrip().startswith('"""'):
                made |= set(re.findall(r'"(KVF\d{3})"', line))
    assert made == set(catalogue())


def test_texts_are_complete_sentences_and_fixes_are_not_empty() -> None:
    for finding_id, entry in catalogue().items():
        assert entry.why.endswith("."), finding_id
        assert entry.story.endswith((".", "?")), finding_id
        assert entry.mend, finding_id
        assert not entry.title.endswith("."), finding_id


def test_errors_come_before_warnings_and_each_finding_once() -> None:
    warning, error = found("KVF013", "a"), found("KVF010", "b")
    assert in_order([warning, error, error]) == [error, warning]
