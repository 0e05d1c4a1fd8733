"""`kvferry up --engine vllm`: a router and real vLLM instances from one command, and all of them gone after Ctrl-C.

In bfloat16, as models are served: the other modules compare in float32, this one asks what rounding cannot change.
"""

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
from serving import PATIENCE_S, call, complete_alone, prompt_of

ARGUMENTS = "--enforce-eager --max-num-seqs 8 --num-gpu-blocks-override 128 --no-enable-log-requests"
# Each of the four best tokens leads by 15 steps of a bfloat16 logit or more; batches and chunks move a logit by one.
CLEAR_PROMPT = prompt_of(300, seed=48)


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
        body = {"model": "m", "prompt": CLEAR_PROMPT, "max_tokens": 4, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"{ready[1]}/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            outcome = answer.headers["x-kvferry-outcome"]
            tokens = json.load(answer)["choices"][0]["token_ids"]
        _, table = call(f"{ready[1].removesuffix('/v1')}/kvferry/v1/instances")
        prefill = next(i["url"] for i in table["instances"] if i["role"] == "prefill")
        expected = complete_alone(prefill, CLEAR_PROMPT, 4)
        up.send_signal(signal.SIGINT)
        rest = up.stdout.read()
    # Router, two API servers, and at least one process of the engine below each.
    assert len(children) >= 5
    assert outcome.startswith("delivered") and "tokens_computed=1;" in outcome
    assert len(tokens) == 4 and tokens == expected
    assert up.returncode == 0 and "all of them have ended" in rest
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
