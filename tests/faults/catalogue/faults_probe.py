"""Faults that only a real rendezvous finds: what lies between two hosts, addresses, secrets and serializers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil

from catalogue.bench import Bench, in_mount_namespace, nixl, on_two_hosts
from catalogue.table import fault, healthy
from kvferry.doctor import Facts, Finding, examine, gather
from kvferry.doctor.rendezvous import probe_transports


def _probe(facts: Facts) -> list[Finding]:
    return examine(msgspec.structs.replace(facts, probe=probe_transports(facts)))


def _probe_apart(bench: Bench, mode: str) -> list[Finding]:
    p, d = on_two_hosts(bench.two_hosts_apart(mode), *nixl(bench))
    return _probe(gather(prefill=[bench.start(p)], decode=[bench.start(d)]))


@healthy
def shm_and_tcp_between_two_processes(bench: Bench) -> list[Finding]:
    return _probe(Facts())


@healthy(needs="root")
def two_hosts_with_loss_and_delay(bench: Bench) -> list[Finding]:
    return _probe_apart(bench, "lossy")


@fault("KVF120", "the instance could not bind again", needs="root")
def the_address_left_the_node(bench: Bench) -> list[Finding]:
    hosts = bench.two_hosts()
    p, d = on_two_hosts(hosts, *nixl(bench))
    facts = gather(prefill=[bench.start(p)], decode=[bench.start(d)], offline=True)
    subprocess.run([*hosts[0], "ip", "addr", "del", "10.77.0.1/24", "dev", "veth0"], check=True)
    return _probe(facts)


@fault("KVF121", "packets between the hosts vanish", needs="root", also=("KVF032",))
def the_probe_finds_no_way_between_hosts(bench: Bench) -> list[Finding]:
    hosts = bench.two_hosts()
    p, d = on_two_hosts(hosts, *nixl(bench))
    facts = gather(prefill=[bench.start(p)], decode=[bench.start(d)], offline=True)
    subprocess.run([*hosts[1], "ip", "route", "del", "10.77.0.0/24"], check=True)
    return _probe(facts)


@fault("KVF087", "connections come and go, nothing is handed over", also=("KVF122",))
def the_sides_have_different_secrets(bench: Bench) -> list[Finding]:
    files = [
        bench.file(f"{side}.env", f"KVFERRY_CLUSTER_SECRET={side * 32}\nCOMMAND=kvferry engine --port {bench.port()}\n")
        for side in "pd"
    ]
    return _probe(gather(prefill=files[:1], decode=files[1:], offline=True))


@fault("KVF122", "one node has last month's secret file")
def the_secret_files_differ(bench: Bench) -> list[Finding]:
    files = []
    for side in "pd":
        secret = bench.file(f"{side}.secret", side * 32)
        Path(secret).chmod(0o600)
        text = f"KVFERRY_CLUSTER_SECRET_FILE={secret}\nCOMMAND=kvferry engine --port {bench.port()}\n"
        files.append(bench.file(f"{side}.env", text))
    return _probe(gather(prefill=files[:1], decode=files[1:], offline=True))


@fault(
    "KVF122", "short messages get through, nothing else: the path's MTU is smaller than both ends believe", needs="root"
)
def large_packets_vanish(bench: Bench) -> list[Finding]:
    return _probe_apart(bench, "small")


@fault("KVF123", "handshakes succeed, transfers stop half-way", needs="root")
def the_path_closes_after_some_megabytes(bench: Bench) -> list[Finding]:
    return _probe_apart(bench, "quota")


@fault("KVF124", "answers are garbage now and then, no error anywhere", needs="root")
def a_card_changes_bytes(bench: Bench) -> list[Finding]:
    return _probe_apart(bench, "flip")


@fault("KVF125", "prefill reports success, an exception is swallowed")
def a_serializer_loses_arrays(bench: Bench) -> list[Finding]:
    bench.file("sitecustomize.py", _LOSES_ARRAYS)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(bench.directory)
    try:
        return _probe(Facts())
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@fault("KVF112", "same-host handoffs at the speed of TCP: each instance in a container of its own", needs="root")
def pid_namespaces_differ(bench: Bench) -> list[Finding]:
    pids = []
    for role in ("prefill", "decode"):
        p, _ = nixl(bench)
        p.args = ["kvferry", "engine", "--role", role, "--port", p.args[p.args.index("--port") + 1]]
        p.env = {"KVFERRY_CLUSTER_SECRET": "s" * 32}
        p.prefix = ["unshare", "--pid", "--fork", "--kill-child"]
        (instance,) = psutil.Process(int(bench.start(p))).children()
        pids.append(str(instance.pid))
    return bench.examine(prefill=pids[:1], decode=pids[1:])


@fault("KVF057", "handoffs twenty times slower than the cards could", needs="root")
def rdma_is_there_and_unused(bench: Bench) -> list[Finding]:
    config = bench.file(
        "mooncake.json",
        {"local_hostname": "127.0.0.1", "metadata_server": "P2PHANDSHAKE", "protocol": "tcp", "device_name": ""},
    )
    # A machine whose kernel shows an RDMA device: /sys/class as the doctor alone sees it.
    port = "/sys/class/infiniband/mlx5_0/ports/1"
    script = f"mount -t tmpfs tmpfs /sys/class && mkdir -p {port} && echo '4: ACTIVE' > {port}/state"
    command = [*in_mount_namespace(script), sys.executable, "-m", "kvferry.cli", "doctor", "--config", config, "--json"]
    done = subprocess.run(command, capture_output=True, cwd=bench.directory, check=False)
    assert done.returncode == 0, done.stderr
    return msgspec.convert(msgspec.json.decode(done.stdout)["findings"], list[Finding])


_LOSES_ARRAYS = """
import numpy
from kvferry import wire

decode = wire.Codec.decode

def lossy(value):
    if isinstance(value, dict):
        return {k: lossy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [lossy(v) for v in value]
    return value.tolist() if isinstance(value, numpy.ndarray) else value

wire.Codec.decode = lambda self, data: lossy(decode(self, data))
"""
