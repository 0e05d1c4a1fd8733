"""`kvferry demo` and `kvferry up` with the real router and the real engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytest.importorskip("torch")
KVFERRY = (sys.executable, "-m", "kvferry")


@pytest.mark.timeout(240)
def test_the_demo_delivers_and_equals_a_single_instance(tmp_path: Path):
    line = [*KVFERRY, "demo", "--requests", "7", "--json", "--engine-num-threads", "1"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["requests"] == report["delivered"] == 7 and report["tokens_equal"] is True
    assert report["recomputed"] == report["failed"] == report["aborted"] == 0
    # One token's KV in float32 is 6 KiB, and the first six prompts have more than 600 tokens.
    assert report["handoff_bytes"] > 600 * 6144 and report["tokens"] > 100
    assert report["handoff_ms_p50"] > 0 and report["ttft_ms_p50"] > 0
    for text in ("What does 🚢 mean?", "《静夜思》", "all tokens equal a single instance's"):
        assert text in done.stdout
    assert done.stderr == ""


@pytest.mark.timeout(240)
def test_up_ends_every_process_with_a_signal(tmp_path: Path):
    line = [*KVFERRY, "up", "--port", "0", "--logs", str(tmp_path / "logs"), "--engine-num-threads", "1"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as up:
        assert up.stdout is not None
        said = ""
        while "ready: OpenAI API at" not in said:
            new = up.stdout.readline()
            assert new, f"kvferry up has ended: {said}"
            said += new
        children = psutil.Process(up.pid).children(recursive=True)
        assert len(children) == 3
        assert re.search(r"ready: OpenAI API at http://127\.0\.0\.1:\d+/v1", said)
        up.send_signal(signal.SIGTERM)
        rest = up.stdout.read()
    assert up.returncode == 0 and "stopping 3 processes" in rest and "have ended" in rest
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {"router.log", "prefill-0.log", "decode-0.log"}


def test_a_model_that_does_not_load_ends_the_start_with_the_instances_own_words(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    done = up_to_the_end(tmp_path, "--model", str(tmp_path / "empty"))
    assert done.returncode == 2
    assert "empty" in done.stderr and "Traceback" not in done.stderr.splitlines()[0]
    assert "(pid" in done.stderr and "ended with status" in done.stderr


def test_a_directory_that_is_not_there_is_said_before_anything_starts(tmp_path: Path):
    done = up_to_the_end(tmp_path, "--model", "./absent")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kvferry: --model: there is no directory ./absent\n"


def up_to_the_end(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    line = [*KVFERRY, "up", "--port", "0", *flags]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    return subprocess.run(line, capture_output=True, text=True, timeout=110, cwd=tmp_path, env=environ, check=False)
