"""The bench on which broken clusters are built: processes, ports, files, namespaces. All of it is taken down."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from kvferry.doctor import Finding, examine, gather

INSTANCE = Path(__file__).with_name("instance.py")
BOX = Path(__file__).with_name("middle_box.py")
MODEL = "Qwen/Qwen3-0.6B"
PORTS = range(20000, 30000)


@dataclass
class Spec:
    """What one side is started with. `serves` are the keys of ports that it listens on."""

    env: dict[str, str] = field(default_factory=dict)
    args: list[str] = field(default_factory=list)
    listens: list[str] = field(default_factory=list)
    prefix: list[str] = field(default_factory=list)
    limits: dict[int, int] = field(default_factory=dict)
    ahead_s: float = 0.0
    open_files: int = 0
    answer: str = ""
    by_script: bool = False

    def flag(self, name: str, value: str | None) -> Spec:
        """Set, replace or (None) remove one flag."""
        if name in self.args:
            at = self.args.index(name)
            del self.args[at : at + 2]
        if value is not None:
            self.args += [name, value]
        return self

    def kv(self, **changes: Any) -> Spec:
        """Change keys of --kv-transfer-config; None removes one."""
        config = json.loads(self.args[self.args.index("--kv-transfer-config") + 1])
        for key, value in changes.items():
            if value is None:
                config.pop(key, None)
            else:
                config[key] = value
        return self.flag("--kv-transfer-config", json.dumps(config))


class Bench:
    """Builds one cluster. Use as a context; everything started or mounted is gone afterwards."""

    def __init__(self, directory: Path, seed: int = 0) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[str]] = []
        self.undo: list[Callable[[], object]] = []
        self.random = random.Random(seed or os.getpid())
        self._taken: set[int] = set()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else ():
                child.kill()
            process.kill()
        for process in self.processes:
            process.wait()
            if process.stdout:
                process.stdout.close()
        for undo in reversed(self.undo):
            undo()

    def port(self, count: int = 1) -> int:
        """The first of `count` ports that nobody holds, below the ephemeral range."""
        while True:
            base = self.random.choice(PORTS)
            wanted = set(range(base, base + count))
            if not wanted & self._taken and all(_is_free(p) for p in wanted):
                self._taken |= wanted
                return base

    def file(self, name: str, content: str | Mapping[str, Any]) -> str:
        """Write a text or JSON file; its path."""
        path = self.directory / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    def start(self, spec: Spec) -> str:
        """Start an instance; its pid, as text."""
        environment = {"PATH": os.environ["PATH"], **spec.env}

        def limit() -> None:
            for which, value in spec.limits.items():
                resource.setrlimit(which, (value, value))

        command = [sys.executable, "-S", str(INSTANCE), " ".join(spec.listens)]
        command += [str(spec.ahead_s), str(spec.open_files), spec.answer]
        command = [*spec.prefix, *command, "--", *spec.args]
        if spec.by_script:
            script = self.file(f"start-{len(self.processes)}.sh", shlex.join(command) + "\nexit $?\n")
            command = ["sh", script]
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=limit if spec.limits else None,
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", f"the stand-in instance did not start: {spec}"
        return str(process.pid)

    def env_file(self, name: str, spec: Spec) -> str:
        """The same instance, described by a file instead of a process."""
        lines = [f"{k}={v}" for k, v in spec.env.items()]
        lines.append("COMMAND=" + shlex.join(spec.args))
        return self.file(name, "\n".join(lines) + "\n")

    def server(self, kind: str, *, stopped: bool = False) -> int:
        """A metadata server of a kind (`etcd`, `redis`, `http`), or one that is `silent`; its port."""
        port = self.port()
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _SERVER, kind, str(port)], stdout=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if stopped:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        return port

    def stop(self, pid: str) -> None:
        """SIGSTOP a process and wait until it stands."""
        os.kill(int(pid), signal.SIGSTOP)
        os.waitid(os.P_PID, int(pid), os.WSTOPPED | os.WNOWAIT)

    def two_hosts(self) -> tuple[list[str], list[str]]:
        """Two network namespaces, 10.77.0.1 and 10.77.0.2, joined by a veth pair; command prefixes that enter them."""
        tag = f"{os.getpid() % 10000}{self.random.randrange(1000)}"
        names = [f"kvf{tag}{x}" for x in "ab"]
        for i, name in enumerate(names, 1):
            _ip("netns", "add", name)
            self.undo.append(lambda name=name: _ip("netns", "del", name))
            if i == 2:
                _ip("link", "add", "veth0", "netns", names[0], "type", "veth", "peer", "name", "veth0", "netns", name)
        for i, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "veth0")
            _ip("-n", name, "link", "set", "veth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        return (["nsenter", f"--net=/run/netns/{names[0]}"], ["nsenter", f"--net=/run/netns/{names[1]}"])

    def two_hosts_apart(self, mode: str) -> tuple[list[str], list[str]]:
        """Two hosts as `two_hosts` makes them, with a middle box between (see middle_box.py for its modes)."""
        tag = f"{os.getpid() % 10000}{self.random.randrange(1000)}"
        names = [f"kvf{tag}{x}" for x in "ab"]
        for name in names:
            _ip("netns", "add", name)
            self.undo.append(lambda name=name: _ip("netns", "del", name))
        box = subprocess.Popen([sys.executable, "-S", str(BOX), *names, mode], stdout=subprocess.PIPE, text=True)
        self.processes.append(box)
        assert box.stdout is not None
        assert box.stdout.readline() == "ready\n"
        for i, name in enumerate(names, 1):
            _ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "net0")
            _ip("-n", name, "link", "set", "net0", "up", "mtu", "60000")
            _ip("-n", name, "link", "set", "lo", "up")
        return (["nsenter", f"--net=/run/netns/{names[0]}"], ["nsenter", f"--net=/run/netns/{names[1]}"])

    def examine(self, **inputs: Any) -> list[Finding]:
        """What the doctor says."""
        return examine(gather(**inputs))


def nixl(bench: Bench, *, tp: int = 1, first_gpu: int = 0) -> tuple[Spec, Spec]:
    """Prefill and decode with NixlConnector on one host, as vLLM's guide sets them up."""
    specs = []
    for i, role in enumerate(("kv_producer", "kv_consumer")):
        http, side = bench.port(), bench.port(tp)
        gpus = ",".join(str(first_gpu + i * tp + r) for r in range(tp))
        config = {"kv_connector": "NixlConnector", "kv_role": role, "kv_load_failure_policy": "fail"}
        args = ["vllm", "serve", MODEL, "--port", str(http), "--enforce-eager"]
        args += ["--tensor-parallel-size", str(tp)] if tp > 1 else []
        specs.append(
            Spec(
                env={
                    "CUDA_VISIBLE_DEVICES": gpus,
                    "UCX_NET_DEVICES": "all",
                    "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side),
                },
                args=[*args, "--kv-transfer-config", json.dumps(config)],
                listens=[f"127.0.0.1:{http}", f"127.0.0.1:{side}"],
            )
        )
    return specs[0], specs[1]


def mooncake(bench: Bench, *, tp: int = 1) -> tuple[Spec, Spec]:
    """Prefill and decode with today's MooncakeConnector over TCP on one host."""
    p, d = nixl(bench, tp=tp)
    for spec, role in ((p, "kv_producer"), (d, "kv_consumer")):
        bootstrap = spec.env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")
        spec.env.pop("UCX_NET_DEVICES")
        spec.env["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = bootstrap
        extra = {"mooncake_protocol": "tcp"}
        config = {"kv_connector": "MooncakeConnector", "kv_role": role, "kv_connector_extra_config": extra}
        spec.flag("--kv-transfer-config", json.dumps(config))
    d.listens.pop()
    return p, d


def old_mooncake(bench: Bench, *, tp: int = 1, **changes: Any) -> tuple[Spec, Spec, str]:
    """Prefill and decode with Mooncake's first connector on one host, and the mooncake.json that both read."""
    p, d = nixl(bench, tp=tp)
    base = bench.port(160)
    config = {
        "prefill_url": f"127.0.0.1:{base}",
        "decode_url": f"127.0.0.1:{base + 100}",
        "metadata_server": f"redis://127.0.0.1:{bench.server('redis')}" if "metadata_server" not in changes else "",
        "protocol": "tcp",
        "device_name": "",
        **changes,
    }
    path = bench.file("mooncake.json", {k: v for k, v in config.items() if v is not None})
    for rank, (spec, role) in enumerate(((p, "kv_producer"), (d, "kv_consumer"))):
        spec.env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")
        spec.env.pop("UCX_NET_DEVICES")
        spec.env["MOONCAKE_CONFIG_PATH"] = path
        spec.listens.pop()
        kv = {"kv_connector": "MooncakeConnector", "kv_role": role, "kv_rank": rank, "kv_parallel_size": 2}
        spec.flag("--kv-transfer-config", json.dumps(kv))
    return p, d, path


def change_json(path: str, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    config = json.loads(Path(path).read_text())
    config.update(changes)
    Path(path).write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def on_two_hosts(hosts: tuple[list[str], list[str]], p: Spec, d: Spec) -> tuple[Spec, Spec]:
    """Put prefill and decode on 10.77.0.1 and 10.77.0.2, each listening on all and telling its own address."""
    for i, (spec, prefix) in enumerate(zip((p, d), hosts, strict=True), 1):
        spec.prefix = prefix
        spec.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = f"10.77.0.{i}"
        spec.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in spec.listens]
    return p, d


def run(bench: Bench, p: Spec, d: Spec, **inputs: Any) -> list[Finding]:
    """Start both and examine them by pid."""
    return bench.examine(prefill=[bench.start(p)], decode=[bench.start(d)], **inputs)


def can_make_namespaces() -> bool:
    """Whether this machine lets us make network and mount namespaces."""
    tools = all(shutil.which(t) for t in ("ip", "nsenter", "unshare"))
    if os.geteuid() != 0 or not tools or not Path("/dev/net/tun").exists():
        return False
    return subprocess.run(["unshare", "-n", "-m", "true"], capture_output=True, check=False).returncode == 0


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[tuple[socket.socket, int]]:
    """A socket of this test's process that listens; with its port."""
    with socket.socket() as s:
        s.bind((host, 0))
        s.listen(8)
        yield s, s.getsockname()[1]


def in_mount_namespace(script: str) -> list[str]:
    """A command prefix: run `script` in a mount namespace of its own, then what follows."""
    return ["unshare", "-m", "sh", "-c", f'{script} && exec "$@"', "sh"]


def own_address() -> str:
    """An address of this machine other than loopback; made up where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(s.getsockname()[0])


def own_interface() -> str:
    """The name of an interface other than loopback; `lo` where there is none."""
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    return names[0] if names else "lo"


def fields(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    """Ids with what was seen, for messages of failed tests."""
    return [(f.id, f.seen) for f in findings]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


_SERVER = r"""
import contextlib, socket, sys
kind, port = sys.argv[1], int(sys.argv[2])
answers = {
    "redis": b"+PONG\r\n",
    "etcd": b'HTTP/1.0 200 OK\r\n\r\n{"etcdserver":"3.5.9","etcdcluster":"3.5.0"}',
    "http": b"HTTP/1.0 404 Not Found\r\n\r\nmetadata not found",
}
held = []
s = socket.socket()
s.bind(("127.0.0.1", port))
s.listen(8)
print("ready", flush=True)
while True:
    c, _ = s.accept()
    if kind == "silent":
        held.append(c)
        continue
    with c, contextlib.suppress(OSError):
        c.settimeout(0.5)
        if c.recv(4096):
            c.sendall(answers[kind])
"""
