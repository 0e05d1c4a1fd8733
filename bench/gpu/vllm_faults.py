"""Faults under real vLLM on two GPUs: sources are killed and stopped, a target is killed, in the middle of handoffs.

    . /tmp/site.env; python3 bench/gpu/vllm_faults.py --out "$OUT/vllm_faults.json"

Five sources on GPU 0 and one target on GPU 1, all up at once, with a saved random model whose answers depend on every
part of its KV cache and that carries 131 KB of KV a token. Rows say for each request how its handoff ended (state,
stage, cause, bytes that had come), how long it took, and whether its tokens are those that the target computes alone;
when all blocks were free; and when the memory of the dead was released, as NVML counts it:

- `kill source`: kill -9 while the target's kernels read finished prompts (`reading`), while the source computes and the
  target pulls what is complete (`computing`), and while the target waits for a prompt that never began (`waiting`);
- `stop source`: SIGSTOP past its lease in the middle of prompts, then SIGCONT;
- `kill target`: kill -9 while it reads and while the source computes; then both sides' new lives hand over again;
- `memory`: with all sources dead and the target alive, GPU 0 is as it was before the first start.

The target runs one sequence at a time, so that a prompt that it recomputes is computed exactly as it is alone.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from vllm_instances import Registry, Server, Site, add_common, start, stop, tiny_models, wait_for
from vllm_report import Report
from vllm_requests import KVFerryPair, Token, complete, random_prompt, tokens_of

from kvferry.types import HandoffId

NUM_TOKENS = 8
MOMENTS = (("reading", 0.005), ("reading", 0.015), ("computing", 0.1), ("waiting", 1.0))
"""When sources are killed: what goes on, and seconds after the target has asked for the first handoff."""
LEASE_S = 5.0
ANSWER_S = 45.0
KV_BYTES = 8_000_000_000
"""61,000 tokens: two prompts of 28,000 at once."""
MIB = 1 << 20


class Sent(NamedTuple):
    """A request under way at the target; `source_leg` where its source was asked too."""

    handoff: HandoffId
    prompt: Token
    began_s: float
    target_leg: Future[Any]
    source_leg: Future[Any] | None


class Memory:
    """What NVML counts as used, in MiB; always 0 on a CPU."""

    def __init__(self, *, cpu: bool) -> None:
        self._gpus: list[Any] = []
        if not cpu:
            from vllm.third_party import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(2)]

    def used(self, gpu: int) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._gpus[gpu]).used) // MIB if self._gpus else 0


class Faults:
    """One target, the sources that still live, and what is asked of them."""

    def __init__(self, report: Report, registry: Registry, memory: Memory, target: Server, *, cpu: bool) -> None:
        self.report, self.registry, self.memory, self.target = report, registry, memory, target
        self.rng = random.Random(5)
        self.length, self.count = (1500, 2) if cpu else (28000, 2)
        self.kv_mib = 0 if cpu else KV_BYTES // MIB

    def send(self, pair: KVFerryPair, *, to_source: bool = True) -> Sent:
        prompt = random_prompt(self.rng, self.length)
        handoff, source_data, target_data = pair.legs(prompt, NUM_TOKENS)
        began_s = time.perf_counter()
        source_leg = pair.send(pair.prefill, source_data) if to_source else None
        return Sent(handoff, prompt, began_s, pair.send(pair.decode, target_data), source_leg)

    def send_computed(self, pair: KVFerryPair, count: int) -> list[Sent]:
        """Prompts that the source has whole before the target asks, so that it reads all of them at once."""
        prompts = [random_prompt(self.rng, self.length) for _ in range(count)]
        legs = [(prompt, *pair.legs(prompt, NUM_TOKENS)) for prompt in prompts]
        source_legs = [pair.send(pair.prefill, source_data) for _, _, source_data, _ in legs]
        for leg in source_legs:
            leg.result(ANSWER_S)
        return [
            Sent(handoff, prompt, time.perf_counter(), pair.send(pair.decode, target_data), leg)
            for (prompt, handoff, _, target_data), leg in zip(legs, source_legs, strict=True)
        ]

    def wait_asked(self, num_before: int) -> None:
        """Until the target's worker has asked for one more handoff than before."""
        wait_for(lambda: self.num_asked() > num_before, 15, "the target asks for the handoff", every_s=0.0005)

    def num_asked(self) -> int:
        trace = trace_of(self.report.folder, self.target.name)
        return trace.read_text().count(" asked\n") if trace.exists() else 0

    def endings(self, sent: list[Sent], pair: KVFerryPair) -> list[dict[str, Any]]:
        """How each request ended at the target, its tokens against those that the target computes alone.

        After a handoff the last token of the prompt is computed by itself, which rounds otherwise than in a chunk: what
        was delivered is also compared with the same handoff once more.
        """
        rows = []
        for request in sent:
            row: dict[str, Any] = {}
            try:
                ended_s, answer = request.target_leg.result(ANSWER_S)
                row |= {"status": 200, "seconds": round(ended_s - request.began_s, 3), "tokens": tokens_of(answer)}
            except (OSError, RuntimeError, ValueError) as error:
                row |= {"status": f"{type(error).__name__}: {error}"[:300]}
                row["seconds"] = round(time.perf_counter() - request.began_s, 3)
            if (outcome := self.registry.outcome(request.handoff)) is not None:
                row |= {"state": outcome.state, "stage": outcome.stage, "cause": outcome.cause}
                row |= {"bytes_moved": outcome.bytes_moved, "transport": outcome.transport}
            rows.append(row)
        for request, row in zip(sent, rows, strict=True):
            if "tokens" not in row:
                continue
            tokens = row.pop("tokens")
            row["tokens_equal"] = tokens == complete(pair.decode, request.prompt, NUM_TOKENS)[1]
            if row.get("state") == "delivered" and pair.prefill.process.poll() is None:
                row["tokens_equal_again"] = tokens == pair.request(request.prompt, NUM_TOKENS).token
        return rows

    def all_free_after(self, server: Server, within_s: float = 20.0) -> float | None:
        """Seconds until all blocks are free; a request without a ticket makes vLLM step, and say so."""

        def is_free() -> bool:
            complete(server, [700, 701, 702], 1)
            return server.is_all_free()

        return seconds_until(is_free, within_s)

    def released(self, before_mib: int, within_s: float = 20.0) -> dict[str, Any]:
        """When GPU 0 has at least the dead source's KV cache back, which the target had mapped."""
        seconds = seconds_until(lambda: before_mib - self.memory.used(0) >= self.kv_mib, within_s)
        gpu0_mib = {"before": before_mib, "after": self.memory.used(0), "kv": self.kv_mib}
        return {"released_s": seconds, "gpu0_mib": gpu0_mib}

    def delivered(self, source: Server) -> dict[str, Any]:
        """A handoff as it should be, from this source."""
        pair = KVFerryPair(source, self.target, self.registry)
        sent = self.send(pair)
        return {"source": source.name, **self.endings([sent], pair)[0]}


def seconds_until(probe: Callable[[], bool], within_s: float) -> float | None:
    """None where it did not come true in time."""
    try:
        return round(wait_for(probe, within_s, "the condition", every_s=0.05), 2)
    except TimeoutError:
        return None


def trace_of(folder: Path, name: str) -> Path:
    return folder / f"trace-{name}.txt"


def kill_source(faults: Faults, source: Server, moment: str, delay_s: float) -> None:
    pair = KVFerryPair(source, faults.target, faults.registry)
    asked = faults.num_asked()
    if moment == "reading":
        sent = faults.send_computed(pair, faults.count)
        faults.wait_asked(asked)
    elif moment == "computing":
        sent = [faults.send(pair) for _ in range(faults.count)]
        faults.wait_asked(asked)
    else:
        sent = [faults.send(pair, to_source=False)]
        faults.wait_asked(asked)
    time.sleep(delay_s)
    before_mib = faults.memory.used(0)
    source.kill()
    row = {"section": "kill source", "moment": moment, "source": source.name, "killed_after_ms": delay_s * 1e3}
    row |= faults.released(before_mib)
    row["requests"] = faults.endings(sent, pair)
    row["target_free_s"] = faults.all_free_after(faults.target)
    faults.report.add(row)


def stop_source(faults: Faults, source: Server) -> None:
    """One prompt in the middle, one that the source has not seen."""
    pair = KVFerryPair(source, faults.target, faults.registry)
    asked = faults.num_asked()
    sent = [faults.send(pair)]
    faults.wait_asked(asked)
    time.sleep(0.03)
    source.signal(signal.SIGSTOP)
    try:
        sent.append(faults.send(pair))
        unanswered = concurrent.futures.wait([r.target_leg for r in sent], ANSWER_S).not_done
        time.sleep(max(0.0, 2 * LEASE_S - (time.perf_counter() - sent[0].began_s)))
    finally:
        source.signal(signal.SIGCONT)
    row: dict[str, Any] = {"section": "stop source", "source": source.name, "lease_s": LEASE_S}
    row |= {"unanswered_while_stopped": len(unanswered), "requests": faults.endings(sent, pair)}
    row["source_legs"] = [outcome_of(r.source_leg) for r in sent]
    row["source_free_s"], row["target_free_s"] = faults.all_free_after(source), faults.all_free_after(faults.target)
    faults.report.add({**row, "afterwards": faults.delivered(source)})


def outcome_of(leg: Future[Any] | None) -> str:
    if leg is None:
        return "not asked"
    try:
        leg.result(ANSWER_S)
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "answered"


def kill_target(faults: Faults, source: Server) -> None:
    """While it reads finished prompts and the source computes others; the source's blocks come back with the lease."""
    pair = KVFerryPair(source, faults.target, faults.registry)
    asked = faults.num_asked()
    sent = [*faults.send_computed(pair, faults.count - 1), faults.send(pair)]
    faults.wait_asked(asked)
    before_mib = faults.memory.used(1)
    killed_s = time.perf_counter()
    faults.target.kill()
    row: dict[str, Any] = {"section": "kill target", "source": source.name, "lease_s": LEASE_S}
    row["requests"] = [outcome_of(request.target_leg) for request in sent]
    row["source_legs"] = [outcome_of(request.source_leg) for request in sent]
    free_s = faults.all_free_after(source)
    row["source_free_s"] = None if free_s is None else round(time.perf_counter() - killed_s, 2)
    row["gpu1_mib"] = {"before": before_mib, "after": faults.memory.used(1)}
    faults.report.add(row)


def new_lives(faults: Faults, sources: list[Server], dead: Server) -> None:
    """The target and one dead source start again; handoffs from both an old and a new source."""
    for server in (faults.target, dead):
        faults.registry.reports.pop(server.name, None)
        server.start()
    began_s = time.perf_counter()
    if len(start([faults.target, dead], faults.registry, patience=faults.report.patience)) < 2:
        raise RuntimeError("not both started again")
    row: dict[str, Any] = {"section": "new lives", "start_s": round(time.perf_counter() - began_s, 1)}
    warm_up([faults.target, dead], faults)
    row["handoffs"] = [faults.delivered(source) for source in (*sources, dead)]
    row["target_free_s"] = faults.all_free_after(faults.target)
    faults.report.add(row)


def memory_returns(faults: Faults, sources: list[Server], at_first_mib: int) -> None:
    """All sources are killed while the target lives on: nothing of theirs may stay mapped."""
    for source in sources:
        if source.process.poll() is None:
            source.kill()
    seconds = seconds_until(lambda: faults.memory.used(0) <= at_first_mib + 64, 20)
    row: dict[str, Any] = {"section": "memory", "released_s": seconds}
    row |= {"gpu0_mib": {"at_first": at_first_mib, "at_last": faults.memory.used(0)}}
    faults.report.add({**row, "target_alive": faults.target.is_healthy()})


def warm_up(servers: list[Server], faults: Faults) -> None:
    """First forwards compile for seconds, in which no handoff would be answered."""
    for server in servers:
        complete(server, random_prompt(faults.rng, faults.length), 2)


def save_model(folder: Path) -> Path:
    """A Llama of 8 layers with 32 KV heads of 128: much KV, little to compute."""
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2048,
            num_hidden_layers=8,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            # As in tools/make_tiny_models.py: attention must be sharp, or answers hardly depend on the KV cache.
            initializer_range=0.1,
            dtype="bfloat16",
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def disturb(faults: Faults, sources: list[Server], moments: Sequence[tuple[str, float]], at_first_mib: int) -> None:
    """All sections after the start; the last source outlives the first ones, and the target."""
    section = faults.report.section
    *victims, survivor = sources
    with section("warm-up", 60):
        warm_up([*sources, faults.target], faults)
        faults.report.add({"section": "undisturbed", "handoffs": [faults.delivered(source) for source in sources]})
    for victim, (moment, delay_s) in zip(victims, moments, strict=False):
        with section(f"kill source: {moment}", 60):
            kill_source(faults, victim, moment, delay_s)
    with section("stop source", 60):
        stop_source(faults, survivor)
    with section("kill target", 40):
        kill_target(faults, survivor)
    with section("new lives", 120):
        new_lives(faults, [survivor], victims[0])
    with section("memory", 40):
        memory_returns(faults, sources, at_first_mib)


def main() -> int:
    ask = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_common(ask, "vllm_faults")
    options = ask.parse_args()
    flags = ["--no-enable-prefix-caching", "--dtype", "bfloat16"]
    if options.cpu:
        tiny_models(options.models, "llama")
        model, length = options.models / "llama", 4096
        flags += ["--max-num-batched-tokens", "512"]
    else:
        model, length = save_model(options.models / "llama-wide"), 33000
    site = Site(model, options.out.parent, KV_BYTES, length, tuple(flags), cpu=options.cpu)
    report, registry = Report(options.out, patience=site.patience, lease_s=LEASE_S), Registry()
    memory = Memory(cpu=options.cpu)
    at_first_mib = memory.used(0)
    trace_of(report.folder, "D").unlink(missing_ok=True)
    moments = MOMENTS[1:] if options.cpu else MOMENTS
    servers: list[Server] = []
    try:
        for name in (*(f"P{number}" for number in range(len(moments) + 1)), "D"):
            is_target = name == "D"
            extra = {"trace": str(trace_of(report.folder, name)), "max_loading_share": 1.0} if is_target else {}
            role = "kv_consumer" if is_target else "kv_producer"
            kv = registry.connector(name, role, lease_ttl_s=LEASE_S, **extra)
            seqs = ["--max-num-seqs", "1" if is_target else "16"]
            servers.append(Server(name, site, kv, gpus="1" if is_target else "0", flags=seqs))
        serving: list[Server] = []
        with report.section("start", 240):
            serving = start(servers, registry, patience=report.patience)
            if len(serving) < len(servers):
                raise RuntimeError(f"only {', '.join(s.name for s in serving)} started")
        *sources, target = serving
        if len(sources) >= 2 and target.name == "D":
            disturb(Faults(report, registry, memory, target, cpu=options.cpu), sources, moments, at_first_mib)
    finally:
        stop(servers)
        report.finish(cpu=options.cpu)
    return 1 if report.num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
