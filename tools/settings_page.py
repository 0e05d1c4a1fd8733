"""Write docs/settings.md out of the tree of settings: `python tools/settings_page.py > docs/settings.md`."""

from __future__ import annotations

import sys

from kvferry.config import SETTINGS

HEAD = """\
# Settings

One tree for all processes of a cluster: defaults, then `kvferry.toml` in the working directory (or the file that
`KVFERRY_CONFIG` names), then the environment, then flags; the later wins. An unknown key or a bad value is an error
that names the key, its source and the nearest right one. Sizes and times take units: `64MiB`, `250ms`, `2s`, `1.5min`;
a bare number means bytes or seconds.

```toml
# kvferry.toml
[cluster]
secret_file = "/etc/kvferry/secret"     # required as soon as anything listens beyond loopback

[handoff]
deadline_s = "20s"
```

The same by the environment: `KVFERRY_HANDOFF_DEADLINE_S=20s`. The same by a flag: `--handoff-deadline-s 20s`; a command
takes the settings of its own section without the section's name (`kvferry router --port 8000`). `cluster.secret` has no
flag, since every user of a machine can read its processes' command lines.

This page is written by `tools/settings_page.py`.
"""


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    section = ""
    for setting in SETTINGS.values():
        if setting.section != section:
            section = setting.section
            lines.append(f"\n## {section}\n\n| key | variable | default | |\n|---|---|---|---|\n")
        default = f"`{setting.default_text}`" if setting.default_text else ""
        choices = f" (one of {', '.join(f'`{c}`' for c in setting.choices)})" if setting.choices else ""
        lines.append(f"| `{setting.key}` | `{setting.variable}` | {default} | {setting.help}{choices} |\n")
    return "".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
