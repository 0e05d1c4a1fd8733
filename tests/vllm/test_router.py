"""Real vLLM behind the real router: `kvferry up` with two prefill and two decode instances, then one that dies."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from serving import (
    ENVIRONMENT,
    FLAGS,
    PATIENCE_S,
    Server,
    call,
    complete_alone,
    die_with_parent,
    free_port,
    kv_config,
    prompt_of,
    wait_for,
)

MODEL = "qwen3"
NUM_TOKENS = 12
LENGTHS = (1, 5, 127, 128, 129, 300, 1000, 1900)
GREEDY = {"temperature": 0}
SEEDED = {"temperature": 0.9, "seed": 4711, "top_p": 0.95}
# No chunks: see test_tokens.py.
WHOLE = ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048"]
# The cluster would draw one by itself; the instance that joins by hand must know it.
SECRET = {"KVFERRY_CLUSTER_SECRET": "a secret for this test alone"}


class Cluster:
    """`kvferry up --engine vllm` in a process group of its own."""

    def __init__(self, model, logs):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.logs = logs
        flags = [f for f in FLAGS if f not in ("--host", "127.0.0.1")]
        command = [str(Path(sys.executable).parent / "kvferry"), "up", "--engine", "vllm", "--model", str(model)]
        command += ["--prefill", "2", "--decode", "2", "--port", str(port), "--logs", str(logs)]
        command += ["--router-stream-first-token", "--handoff-lease-ttl-s", "20s", "--handoff-deadline-s", "60s"]
        command += ["--vllm-args", " ".join([*flags, *WHOLE])]
        with (logs / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ENVIRONMENT, **SECRET},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def instances(self):
        """The router's table: instance id -> its report."""
        status, answer = call(f"{self.url}/kvferry/v1/instances")
        assert status == 200
        return {i["instance_id"]: i for i in answer["instances"]}

    def wait_joined(self, num_instances):
        def joined():
            if self.process.poll() is not None:
                raise RuntimeError(f"kvferry up ended:\n{self.tail()}")
            try:
                return len(self.instances()) == num_instances
            except OSError:
                return False

        wait_for(joined, f"{num_instances} instances at the router", 450)

    def tail(self):
        return "\n".join(
            f"== {p.name}\n{p.read_text(errors='replace')[-3000:]}" for p in sorted(self.logs.glob("*.log"))
        )

    def server_process(self, name):
        """The `vllm serve` process of this instance."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            line = process.cmdline()
            if "serve" in line and any(f'"instance_id":"{name}"' in part for part in line):
                return process
        raise AssertionError(f"no process of {name}")

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)


def ask(url, prompt, options=GREEDY):
    """(tokens, outcome line) of one request to the router."""
    body = {"model": "m", "prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}
    data = json.dumps({**body, "return_token_ids": True}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return json.load(answer)["choices"][0]["token_ids"], answer.headers["x-kvferry-outcome"]


@pytest.fixture(scope="module")
def cluster(model_path, logs):
    cluster = Cluster(model_path(MODEL), logs)
    try:
        cluster.wait_joined(4)
        for instance in cluster.instances().values():
            call(f"{instance['url']}/v1/completions", {"model": "m", "prompt": prompt_of(700, 9), "max_tokens": 2})
        yield cluster
    finally:
        cluster.stop()


def reference(cluster, prompt, options=GREEDY):
    """What one of the instances answers alone, without a handoff."""
    instance = next(i for i in cluster.instances().values() if i["role"] == "decode")
    return complete_alone(instance["url"], prompt, NUM_TOKENS, **options)


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("at_a_time", [1, 16])
def test_two_prefill_and_two_decode_instances(cluster, options, at_a_time):
    lengths = LENGTHS * (2 if at_a_time > 1 else 1)
    prompts = [prompt_of(n, seed=1000 * at_a_time + 100 * len(options) + i) for i, n in enumerate(lengths)]
    with ThreadPoolExecutor(at_a_time) as pool:
        answers = list(pool.map(lambda p: ask(cluster.url, p, options), prompts))
    for prompt, (tokens, outcome) in zip(prompts, answers, strict=True):
        assert outcome.startswith("delivered"), outcome
        assert "tokens_computed=1;" in outcome, outcome
        assert tokens == reference(cluster, prompt, options), f"prompt of {len(prompt)} tokens"


def texts_of(answer):
    """The texts of a stream's events, as they come."""
    for line in answer:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])["choices"][0]["text"]


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_prefills_token_is_streamed_at_once_and_is_decodes_own(cluster, options):
    """The client has it while no decode instance can say a word; decode's own is compared, or the stream would fail."""
    for i, length in enumerate((1, 129, 1000)):
        prompt = prompt_of(length, seed=5000 + 100 * len(options) + i)
        body = {"model": "m", "prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, **options}
        instance = next(i for i in cluster.instances().values() if i["role"] == "decode")
        alone = {**body, "cache_salt": "computed alone"}
        expected = call(f"{instance['url']}/v1/completions", alone)[1]["choices"][0]["text"]
        decoders = [
            p
            for name, i in cluster.instances().items()
            if i["role"] == "decode"
            for p in [cluster.server_process(name), *cluster.server_process(name).children(recursive=True)]
        ]
        request = urllib.request.Request(
            f"{cluster.url}/v1/completions",
            json.dumps({**body, "stream": True}).encode(),
            {"content-type": "application/json"},
        )
        for process in decoders:
            process.send_signal(signal.SIGSTOP)
        try:
            answer = urllib.request.urlopen(request, timeout=PATIENCE_S)
            texts = texts_of(answer)
            first = next(texts)
        finally:
            for process in decoders:
                process.send_signal(signal.SIGCONT)
        with answer:
            rest = "".join(texts)
        assert first and first + rest == expected, f"prompt of {length} tokens"


def test_all_four_instances_took_part(cluster):
    pages = [call(f"{i['url']}/metrics")[1] for i in cluster.instances().values()]
    for metric, side in (("handoffs", "decode"), ("releases", "prefill")):
        assert sum(f"vllm:kvferry_{metric}_total{{" in page for page in pages) == 2, f"both {side} instances took part"


def test_a_killed_instance_is_routed_around_and_its_successor_is_used(cluster, model_path, logs):
    name = next(i for i, report in cluster.instances().items() if report["role"] == "prefill")
    server = cluster.server_process(name)
    for process in [*server.children(recursive=True), server]:
        process.kill()
    began = time.monotonic()
    for seed in range(50, 54):
        prompt = prompt_of(300, seed)
        tokens, outcome = ask(cluster.url, prompt)
        assert outcome.split(";")[0] in ("delivered", "recomputed")
        assert tokens == reference(cluster, prompt)
    assert time.monotonic() - began < 100

    class Router:
        url = cluster.url

    kv = kv_config(Router, name, role="kv_producer")
    successor = Server("successor", model_path(MODEL), logs, kv=kv, flags=WHOLE, environment=SECRET)
    try:
        successor.ready()
        wait_for(lambda: cluster.instances().get(name, {}).get("url") == successor.url, "the successor joins")
        call(f"{successor.url}/v1/completions", {"model": "m", "prompt": prompt_of(700, 9), "max_tokens": 2})
        released = successor.metric("vllm:kvferry_releases_total")
        for seed in range(60, 68):
            assert ask(cluster.url, prompt_of(300, seed))[1].startswith("delivered")
        assert successor.metric("vllm:kvferry_releases_total") > released, "traffic returned to it"
    finally:
        successor.stop()
