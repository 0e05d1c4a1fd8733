"""`kvferry up --engine vllm`: a router and real vLLM instances from one command, and all of them gone after Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import psutil
import pytest

ARGUMENTS = "--enforce-eager --max-num-seqs 8 --num-gpu-blocks-override 128 --no-enable-log-requests"


@pytest.mark.timeout(420)
def test_up_serves_over_a_handoff_and_ends_every_process(model_path, tmp_path):
    line = [sys.executable, "-m", "kvferry", "up", "--engine", "vllm", "--model", str(model_path("llama"))]
    line += ["--port", "0", "--logs", str(tmp_path), "--engine-dtype", "bfloat16", "--engine-max-model-len", "2048"]
    line += ["--engine-served-model-name", "m", "--vllm-args", ARGUMENTS]
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as up:
        assert up.stdout is not None
        said = ""
        while (ready := re.search(r"ready: OpenAI API at (\S+)", said)) is None:
            new = up.stdout.readline()
            assert new, f"kvferry up has ended:\n{said}"
            said += new
        children = psutil.Process(up.pid).children(recursive=True)
        body = {"model": "m", "prompt": [(7 * i + 5) % 250 + 1 for i in range(300)], "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{ready[1]}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            outcome = answer.headers["x-kvferry-outcome"]
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        up.send_signal(signal.SIGINT)
        rest = up.stdout.read()
    # Router, two API servers, and at least one process of the engine below each.
    assert len(children) >= 5
    assert outcome.startswith("delivered") and "tokens_computed=1;" in outcome
    assert up.returncode == 0 and "all of them have ended" in rest
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
