"""Precision and recall of the doctor over the catalogue, and the table of docs/faults.md.

python tests/faults/catalogue/score.py            run every fault and every healthy cluster, print the score
python tests/faults/catalogue/score.py --write    write docs/faults.md (nothing is run)
"""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from catalogue import every
from catalogue.bench import Bench, can_make_namespaces, fields
from catalogue.table import FAULTS, HEALTHY
from kvferry.doctor.findings import catalogue

DOCS = Path(__file__).parents[3] / "docs" / "faults.md"
assert every


def table() -> str:
    """The content of docs/faults.md."""
    texts = catalogue()
    lines = [
        "# Faults, and what the doctor says of them",
        "",
        f"{len(FAULTS)} faults, each built for real in `tests/faults/catalogue` (processes, ports, servers, network",
        "namespaces, proxies, logs) and named by `kvferry doctor` as its first finding, with nothing false beside it;",
        f"{len(HEALTHY)} healthy clusters give no finding. `make faults` runs them and prints precision and recall.",
        "",
        "What each cause of a failed or recomputed request means, and each code of an error: "
        "[findings/causes.md](findings/causes.md).",
        "",
        "| fault | symptom | finding | mend |",
        "|---|---|---|---|",
    ]
    for fault in sorted(FAULTS.values(), key=lambda f: f.expected):
        entry = texts[fault.expected]
        found = f"[{fault.expected}](findings/{fault.expected}.md) {entry.title}"
        lines.append(f"| {fault.name} | {fault.symptom} | {found} | {entry.mend} |")
    return "\n".join(lines) + "\n"


def score() -> int:
    """Run everything; 0 if precision and recall are 1."""
    logging.getLogger("kvferry").addHandler(logging.NullHandler())
    namespaces = can_make_namespaces()
    num = named = first = said = false = skipped = 0
    for fault in FAULTS.values():
        if fault.needs == "root" and not namespaces:
            skipped += 1
            continue
        with tempfile.TemporaryDirectory() as directory, Bench(Path(directory)) as bench:
            findings = fault.build(bench)
        num += 1
        wrong = [f for f in findings if f.id not in (fault.expected, *fault.also)]
        named += any(f.id == fault.expected for f in findings)
        first += bool(findings) and findings[0].id == fault.expected
        said += len(findings)
        false += len(wrong)
        if wrong or not findings or findings[0].id != fault.expected:
            print(f"{fault.name}: expected {fault.expected}, got {fields(findings)}")
    for name, cluster in HEALTHY.items():
        if cluster.needs == "root" and not namespaces:
            skipped += 1
            continue
        with tempfile.TemporaryDirectory() as directory, Bench(Path(directory)) as bench:
            findings = cluster.build(bench)
        said += len(findings)
        false += len(findings)
        if findings:
            print(f"healthy: {name}: got {fields(findings)}")
    print(
        f"doctor: {num} faults ({skipped} skipped), {len(HEALTHY)} healthy clusters: recall {named / num:.3f}, "
        f"named first {first / num:.3f}, precision {(said - false) / max(1, said):.3f} ({said} findings, {false} false)"
    )
    return 0 if first == num and not false else 1


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        DOCS.write_text(table())
    else:
        sys.exit(score())
