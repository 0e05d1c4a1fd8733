"""promtool and a real Prometheus take the alarms, and Prometheus evaluates them on a real router's metrics."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pool_processes import WAIT_S, fixed_port

MONITORING = Path(__file__).parents[3] / "monitoring"
PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    PROMTOOL is None or PROMETHEUS is None, reason="needs promtool and prometheus (Debian's package prometheus)"
)


@needs_prometheus
def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    assert PROMTOOL is not None
    rules, tests = MONITORING / "prometheus-rules.yml", MONITORING / "prometheus-rules.test.yml"
    for command in (["check", "rules", str(rules)], ["test", "rules", str(tests)]):
        done = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_a_real_prometheus_evaluates_the_rules_on_a_real_router(tmp_path: Path) -> None:
    assert PROMETHEUS is not None
    router = subprocess.Popen(
        [sys.executable, "-m", "kvferry.cli", "router", "--port", "0"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    prometheus: subprocess.Popen[bytes] | None = None
    try:
        assert router.stdout is not None
        target = router.stdout.readline().split()[-1].removeprefix("http://")
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(MONITORING / "prometheus-rules.yml")],
            "scrape_configs": [{"job_name": "kvferry", "static_configs": [{"targets": [target]}]}],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        port = fixed_port()
        prometheus = subprocess.Popen(
            [
                PROMETHEUS,
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        base = f"http://127.0.0.1:{port}/api/v1"
        rules = _until(lambda: _evaluated(base), WAIT_S)
        assert {r["health"] for r in rules} == {"ok"}, rules
        up = _until(lambda: _ask(f"{base}/query?query=up")["data"]["result"], WAIT_S)
        assert up[0]["value"][1] == "1"
        # A router alone has no instances, and just that alarm is on its way.
        pending = _until(
            lambda: [r for r in _evaluated(base) or [] if r.get("state") != "inactive" and r.get("alerts")], WAIT_S
        )
        assert {r["name"] for r in pending} == {"KVFerryNoInstance"}
    finally:
        for process in (prometheus, router):
            if process is not None:
                process.terminate()
                process.wait(WAIT_S)
        if router.stdout is not None:
            router.stdout.close()


def _evaluated(base: str) -> list[dict[str, Any]] | None:
    groups = _ask(f"{base}/rules")["data"]["groups"]
    rules = [r for g in groups for r in g["rules"]]
    return rules if rules and all(r["health"] != "unknown" for r in rules) else None


def _ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def _until(ask: Any, seconds: float) -> Any:
    end = time.monotonic() + seconds
    while True:
        try:
            if got := ask():
                return got
        except OSError:
            pass
        assert time.monotonic() < end, "Prometheus did not get there in time"
        time.sleep(0.2)
