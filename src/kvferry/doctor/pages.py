"""One page of docs for each finding and one for all causes, written from the same table that the doctor speaks from.

python -m kvferry.doctor.pages docs/findings
"""

from __future__ import annotations

import sys
from pathlib import Path

from kvferry.doctor import causes
from kvferry.doctor.findings import Entry, catalogue
from kvferry.doctor.log_rules import rules


def pages() -> dict[str, str]:
    """File name -> content, the index included."""
    out = {f"{finding_id}.md": page(finding_id, entry) for finding_id, entry in catalogue().items()}
    rows = [f"| [{i}]({i}.md) | {e.severity} | {e.title} |" for i, e in catalogue().items()]
    head = ["# Findings of `kvferry doctor`", "", "| id | severity | finding |", "|---|---|---|"]
    more = ["", "What each cause of a failed or recomputed request means: [causes](causes.md)."]
    out["README.md"] = "\n".join([*head, *rows, *more]) + "\n"
    out["causes.md"] = causes.page()
    return out


def page(finding_id: str, entry: Entry) -> str:
    """The page of one finding."""
    lines = [
        f"# {finding_id}: {entry.title}",
        "",
        f"Severity: {entry.severity}",
        "",
        "## Why it stalls decode",
        "",
        entry.why,
        "",
        "## What mends it",
        "",
        entry.mend[0].upper() + entry.mend[1:] + ".",
        "",
        "## The story",
        "",
        entry.story,
    ]
    signs = [r for r, _ in rules() if r.finding == finding_id]
    if signs:
        lines += ["", "## Lines that tell of it", "", "```", *(r.sample for r in signs), "```"]
    return "\n".join(lines) + "\n"


def main(directory: str) -> None:
    """Write every page, and remove those whose finding is gone."""
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for old in target.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (target / name).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
