"""Faults of mooncake.json, the servers that it names, and the machine."""

from __future__ import annotations

import resource
import subprocess

from catalogue.bench import Bench, change_json, in_mount_namespace, mooncake, nixl, old_mooncake, run
from catalogue.table import fault
from kvferry.doctor import Finding


@fault("KVF050", "prefill reports success, decode's look-up never returns")
def etcd_is_absent(bench: Bench) -> list[Finding]:
    p, d, path = old_mooncake(bench, metadata_server=f"127.0.0.1:{bench.port()}", metadata_backend="etcd")
    return run(bench, p, d, config=path)


@fault("KVF050", "the first transfer finds no peer")
def redis_is_absent(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench, metadata_server=f"redis://127.0.0.1:{bench.port()}")
    return run(bench, p, d)


@fault("KVF050", "segments cannot be described")
def http_metadata_server_is_absent(bench: Bench) -> list[Finding]:
    return bench.examine(config=_store(bench, metadata_server=f"http://127.0.0.1:{bench.port()}/metadata"))


@fault("KVF050", "one letter wrong in the server's name")
def metadata_server_does_not_resolve(bench: Bench) -> list[Finding]:
    return bench.examine(config=_store(bench, metadata_server="redis://metadata.nowhere.invalid:6379"))


@fault("KVF051", "look-ups wait for ever")
def metadata_server_is_stopped(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench, metadata_server=f"redis://127.0.0.1:{bench.server('redis', stopped=True)}")
    return run(bench, p, d)


@fault("KVF051", "registration never returns")
def metadata_server_hangs(bench: Bench) -> list[Finding]:
    return bench.examine(config=_store(bench, metadata_server=f"etcd://127.0.0.1:{bench.server('silent')}"))


@fault("KVF052", "no peer is ever found")
def something_else_answers_for_redis(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench, metadata_server=f"redis://127.0.0.1:{bench.server('http')}")
    return run(bench, p, d)


@fault("KVF052", "etcd's port belongs to another web server")
def something_else_answers_for_etcd(bench: Bench) -> list[Finding]:
    return bench.examine(config=_store(bench, metadata_server=f"etcd://127.0.0.1:{bench.server('http')}"))


@fault("KVF053", "puts fail with RPC errors, decode redoes the forward pass")
def the_master_is_absent(bench: Bench) -> list[Finding]:
    return bench.examine(config=_store(bench, master_server_address=f"127.0.0.1:{bench.port()}"))


@fault("KVF054", "the sides register at two places")
def two_files_with_two_metadata_servers(bench: Bench) -> list[Finding]:
    p, d, path = old_mooncake(bench)
    other = bench.file("mooncake-decode.json", "{}")
    with open(path) as source, open(other, "w") as target:  # noqa: PTH123
        target.write(source.read())
    change_json(other, metadata_server=f"redis://127.0.0.1:{bench.server('redis')}")
    d.env["MOONCAKE_CONFIG_PATH"] = other
    return run(bench, p, d)


@fault("KVF054", "each side binds where the other should")
def the_second_file_is_mirrored(bench: Bench) -> list[Finding]:
    p, d, path = old_mooncake(bench)
    import json
    from pathlib import Path

    config = json.loads(Path(path).read_text())
    config["prefill_url"], config["decode_url"] = config["decode_url"], config["prefill_url"]
    d.env["MOONCAKE_CONFIG_PATH"] = bench.file("mooncake-decode.json", config)
    return run(bench, p, d)


@fault("KVF055", "the engine initialises somewhere else")
def metadata_server_is_missing(bench: Bench) -> list[Finding]:
    _, _, path = old_mooncake(bench, metadata_server=None)
    return bench.examine(config=path)


@fault("KVF055", "the key has no effect")
def a_key_is_misspelt(bench: Bench) -> list[Finding]:
    path = _store(bench, metadata_server=None)
    change_json(path, metadata_sever=f"redis://127.0.0.1:{bench.server('redis')}")
    return bench.examine(config=path)


@fault("KVF055", "the engine cannot parse its own address")
def an_url_without_port(bench: Bench) -> list[Finding]:
    _, _, path = old_mooncake(bench)
    change_json(path, decode_url="127.0.0.1")
    return bench.examine(config=path)


@fault("KVF056", "decode's connector does not initialise")
def the_file_is_not_there(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench)
    d.env["MOONCAKE_CONFIG_PATH"] = "./mooncake-old.json"
    return run(bench, p, d)


@fault("KVF056", "decode's connector refuses to start")
def the_variable_is_not_set(bench: Bench) -> list[Finding]:
    p, d, _ = old_mooncake(bench)
    del d.env["MOONCAKE_CONFIG_PATH"]
    return run(bench, p, d)


@fault("KVF033", "clients connect to their own machine")
def local_hostname_is_a_wildcard(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    p.env["MOONCAKE_CONFIG_PATH"] = _store(bench, local_hostname="0.0.0.0")
    return run(bench, p, d)


@fault("KVF058", "the engine fails to open a device")
def rdma_without_a_device(bench: Bench) -> list[Finding]:
    return bench.examine(config=_store(bench, protocol="rdma", device_name="mlx5_0"))


@fault("KVF059", "the second device is never opened")
def device_names_with_spaces(bench: Bench) -> list[Finding]:
    return bench.examine(config=_store(bench, protocol="rdma", device_name="mlx5_0, mlx5_1"))


@fault("KVF080", "a rank cannot allocate, the others wait", needs="root")
def shared_memory_is_full(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.prefix = in_mount_namespace("mount -t tmpfs -o size=1m tmpfs /dev/shm")
    return run(bench, p, d)


@fault("KVF081", "memory registration fails")
def locked_memory_is_limited(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for spec in (p, d):
        spec.env["UCX_TLS"] = "rc,cuda_copy,self"
        spec.limits = {resource.RLIMIT_MEMLOCK: 64 << 10}
    return run(bench, p, d)


@fault("KVF082", "new connections wait in the backlog")
def no_file_may_be_opened(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.limits, p.open_files = {resource.RLIMIT_NOFILE: 64}, 55
    return run(bench, p, d)


@fault("KVF083", "the store's segment cannot be allocated")
def huge_pages_are_not_reserved(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    p.env["MC_STORE_USE_HUGEPAGE"] = "1"
    return run(bench, p, d)


@fault("KVF084", "blocks that were promised are not there", needs="root")
def the_offload_disk_is_full(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    disk = bench.directory / "offload"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    bench.undo.append(lambda: subprocess.run(["umount", disk], check=True))
    p.env["MOONCAKE_OFFLOAD_FILE_STORAGE_PATH"] = str(disk)
    return run(bench, p, d)


@fault("KVF085", "signed requests are refused")
def decode_lives_in_the_future(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.ahead_s = 300.0
    return run(bench, p, d)


@fault("KVF086", "the instance ends at its next start")
def a_key_of_kvferry_is_misspelt(bench: Bench) -> list[Finding]:
    return bench.examine(config=bench.file("kvferry.toml", "[handoff]\ndedline_s = 5\n"))


@fault("KVF012", "the router does not come up")
def a_stranger_holds_the_port_of_kvferry_toml(bench: Bench) -> list[Finding]:
    return bench.examine(config=bench.file("kvferry.toml", f"[router]\nport = {bench.server('http')}\n"))


def _store(bench: Bench, **changes: object) -> str:
    """A correct mooncake.json of the store kind, with changes; its servers run unless they are changed."""
    config: dict[str, object] = {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": 1 << 30,
        "local_buffer_size": 1 << 30,
        **changes,
    }
    return bench.file("mooncake.json", {k: v for k, v in config.items() if v is not None})
