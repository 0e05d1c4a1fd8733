"""docs/settings.md says what the tree says."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_the_page_is_up_to_date():
    page = runpy.run_path(str(ROOT / "tools" / "settings_page.py"))["page"]()
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == written, "do: .venv/bin/python tools/settings_page.py > docs/settings.md"
