"""Rows of a run, each written as it comes: a part that fails or takes too long costs only itself."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class SectionOver(Exception):
    """A section took longer than it may."""


class Report:
    """A JSON file with facts about the run and its rows.

    Args:
        patience: factor of all limits, for a slow machine.
        about: facts beside the commit and the command.
    """

    def __init__(self, path: Path, *, patience: int = 1, **about: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shown = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = shown.stdout.strip() or os.environ.get("COMMIT", "unknown")
        self.about: dict[str, Any] = {"commit": commit, "command": shlex.join(["python3", *sys.argv]), **about}
        self.rows: list[dict[str, Any]] = []
        self.folder, self.patience = path.parent, patience
        self._path, self._began_s = path, time.monotonic()

    @property
    def num_failed(self) -> int:
        return sum("error" in row for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Print the row and write the file anew."""
        self.rows.append(row)
        print(f"[{time.monotonic() - self._began_s:.0f} s] {json.dumps(row)}", flush=True)
        self.write()

    def write(self) -> None:
        self._path.write_text(json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n")

    def finish(self, *, cpu: bool) -> None:
        """Add GPUs and versions. At the end, when it no longer matters that this process takes some GPU memory."""
        with self.section("machine", 60):
            import torch
            from vllm.version import __version__ as vllm_version

            gpus = [] if cpu else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            self.about |= {"gpus": gpus, "vllm": vllm_version, "torch": torch.__version__}
        self.write()

    @contextlib.contextmanager
    def section(self, name: str, limit_s: int) -> Iterator[None]:
        """Run the body, on the main thread, for so long at most; what it raises becomes a row, and the run goes on.

        A section within another one ends the outer one's limit.
        """

        def end(*_: Any) -> None:
            raise SectionOver(f"{name}: stopped after {limit_s * self.patience} s")

        print(f"[{time.monotonic() - self._began_s:.0f} s] {name}", flush=True)
        before = signal.signal(signal.SIGALRM, end)
        signal.alarm(limit_s * self.patience)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the other sections are worth having
            traceback.print_exc()
            self.add({"section": name, "error": f"{type(error).__name__}: {error}"[:2000]})
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
