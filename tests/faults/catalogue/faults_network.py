"""Faults of ports, addresses, names and interfaces."""

from __future__ import annotations

import socket
import subprocess

from catalogue.bench import MODEL, Bench, Spec, in_mount_namespace, mooncake, nixl, old_mooncake, own_address, run
from catalogue.table import fault, healthy
from kvferry.doctor import Finding


@fault("KVF010", "prefill is fine, decode hangs")
def side_channels_on_one_port(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = p.env["VLLM_NIXL_SIDE_CHANNEL_PORT"]
    d.listens.pop()
    return run(bench, p, d)


@fault("KVF010", "decode does not start, or the wrong one answers")
def side_channels_on_the_default_port(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for i, spec in enumerate((p, d)):
        spec.env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")
        spec.listens.pop()
        spec.env["HOSTNAME"] = f"node-{i}"
    return bench.examine(prefill=[bench.env_file("p.env", p)], decode=[bench.env_file("d.env", d)])


@fault("KVF010", "one rank of decode talks to a rank of prefill")
def side_channel_ranges_overlap_under_data_parallelism(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    base = bench.port(8)
    for i, spec in enumerate((p, d)):
        spec.flag("--data-parallel-size", "4").env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(base + 2 * i)
        spec.env["CUDA_VISIBLE_DEVICES"] = "0,1,2,3" if i == 0 else "4,5,6,7"
        spec.listens.pop()
    return run(bench, p, d)


@fault("KVF010", "stuck in drop_select")
def old_mooncake_on_one_port(bench: Bench) -> list[Finding]:
    base = bench.port(20)
    p, d, _ = old_mooncake(bench, prefill_url=f"127.0.0.1:{base}", decode_url=f"127.0.0.1:{base}")
    return run(bench, p, d)


@fault("KVF010", "stuck in drop_select with tensor parallelism only")
def old_mooncake_ranges_meet_with_ranks(bench: Bench) -> list[Finding]:
    base = bench.port(40)
    p, d, _ = old_mooncake(bench, tp=4, prefill_url=f"127.0.0.1:{base}", decode_url=f"127.0.0.1:{base + 10}")
    return run(bench, p, d)


@fault("KVF011", "stuck in drop_select on one node")
def old_mooncake_ports_too_close(bench: Bench) -> list[Finding]:
    base = bench.port(20)
    p, d, _ = old_mooncake(bench, prefill_url=f"127.0.0.1:{base}", decode_url=f"127.0.0.1:{base + 3}")
    return run(bench, p, d)


@fault("KVF010", "the second instance does not start")
def http_ports_equal(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    d.flag("--port", p.args[p.args.index("--port") + 1])
    d.listens.pop(0)
    return run(bench, p, d)


@fault("KVF010", "the second prefill's ranks register with the first")
def two_prefills_with_one_bootstrap_port(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    other, _ = mooncake(bench)
    other.env.update(VLLM_MOONCAKE_BOOTSTRAP_PORT=p.env["VLLM_MOONCAKE_BOOTSTRAP_PORT"], CUDA_VISIBLE_DEVICES="2")
    other.listens.pop()
    return bench.examine(prefill=[bench.start(p), bench.start(other)], decode=[bench.start(d)])


@fault("KVF012", "the handshake goes to a stranger")
def a_stranger_holds_the_side_channel(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    stranger = Spec(args=["backup", "daemon"], listens=[p.listens.pop()])
    bench.start(stranger)
    return run(bench, p, d)


@fault("KVF012", "prefill does not come up again")
def a_former_life_holds_the_bootstrap_port(bench: Bench) -> list[Finding]:
    p, d = mooncake(bench)
    bench.start(Spec(args=["left", "over"], listens=[p.listens[1]]))
    return bench.examine(prefill=[bench.env_file("p.env", p)], decode=[bench.env_file("d.env", d)])


@fault("KVF013", "the instance fails to bind, now and then")
def side_channel_in_the_ephemeral_range(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    with socket.socket() as given_by_the_kernel:
        given_by_the_kernel.bind(("127.0.0.1", 0))
        p.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(given_by_the_kernel.getsockname()[1])
    p.listens.pop()
    return run(bench, p, d)


@fault("KVF014", "the instance fails to bind this time")
def an_outgoing_connection_holds_the_port(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    server, client = socket.socket(), socket.socket()
    bench.undo += [client.close, server.close]
    server.bind(("127.0.0.1", 0))
    server.listen()
    p.listens.pop()
    client.bind(("127.0.0.1", int(p.env["VLLM_NIXL_SIDE_CHANNEL_PORT"])))
    client.connect(server.getsockname())
    accepted, _ = server.accept()
    bench.undo.append(accepted.close)
    return run(bench, p, d)


@healthy
def a_port_whose_last_connection_is_being_closed(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.listens.pop()
    place = ("127.0.0.1", int(p.env["VLLM_NIXL_SIDE_CHANNEL_PORT"]))
    with socket.create_server(place) as listener, socket.create_connection(place) as client:
        listener.accept()[0].close()  # Who closes first keeps the port in TIME_WAIT.
        client.recv(1)
    return run(bench, p, d)


@fault("KVF015", "decode gets connection refused from the advertised address")
def prefill_listens_on_loopback_only(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = own_address()
    return run(bench, p, d)


@fault("KVF020", "both wait in the rendezvous of the process group")
def master_ports_differ(bench: Bench) -> list[Finding]:
    files = []
    for i, role in enumerate(("producer", "consumer")):
        env = {
            "VLLM_DISTRIBUTED_KV_ROLE": role,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(29500 + i),
            "VLLM_PORT": str(21000 + 100 * i),
            "CUDA_VISIBLE_DEVICES": str(i),
        }
        files.append(
            bench.env_file(f"{role}.env", Spec(env=env, args=["vllm", "serve", MODEL, "--port", str(8100 + 100 * i)]))
        )
    return bench.examine(prefill=files[:1], decode=files[1:])


@fault("KVF020", "each side builds a group of its own")
def master_addresses_differ(bench: Bench) -> list[Finding]:
    files = [
        bench.file(f"{side}.env", f"MASTER_ADDR={address}\nMASTER_PORT=29500\nCUDA_VISIBLE_DEVICES={i}\n")
        for i, (side, address) in enumerate((("p", "127.0.0.1"), ("d", "127.0.0.2")))
    ]
    return bench.examine(prefill=files[:1], decode=files[1:])


@fault("KVF020", "the second node joins another place")
def host_ip_differs_where_one_group_spans_nodes(bench: Bench) -> list[Finding]:
    path = bench.file(
        "mooncake.json",
        {
            "prefill_url": "192.168.7.1:13003",
            "decode_url": "192.168.7.2:13003",
            "metadata_server": "192.168.7.1:2379",
            "protocol": "tcp",
            "device_name": "",
        },
    )
    files = []
    for i, role in enumerate(("producer", "consumer"), 1):
        env = {
            "VLLM_DISTRIBUTED_KV_ROLE": role,
            "VLLM_HOST_IP": f"192.168.7.{i}",
            "VLLM_PORT": "51000",
            "MASTER_ADDR": "192.168.7.1",
            "MASTER_PORT": "54324",
        }
        files.append(bench.env_file(f"{role}.env", Spec(env=env, args=["vllm", "serve", MODEL, "--port", "8100"])))
    return bench.examine(prefill=files[:1], decode=files[1:], config=path)


@fault("KVF021", "internal ports are mixed up now and then")
def one_vllm_port_for_two_instances(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_PORT"] = d.env["VLLM_PORT"] = str(bench.port(20))
    return run(bench, p, d)


@fault("KVF022", "decode is sent to the wrong node")
def one_host_ip_for_two_nodes(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for i, spec in enumerate((p, d), 1):
        spec.env["VLLM_HOST_IP"] = "10.9.8.1"
        spec.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = f"10.9.8.{i}"
    return bench.examine(prefill=[bench.env_file("p.env", p)], decode=[bench.env_file("d.env", d)])


@fault("KVF023", "the process group never forms")
def master_address_does_not_resolve(bench: Bench) -> list[Finding]:
    files = [
        bench.file(
            f"{side}.env", f"MASTER_ADDR=prefill-0.nowhere.invalid\nMASTER_PORT=29500\nCUDA_VISIBLE_DEVICES={i}\n"
        )
        for i, side in enumerate("pd")
    ]
    return bench.examine(prefill=files[:1], decode=files[1:])


@fault("KVF023", "the process group never forms on two hosts", needs="root")
def master_address_has_no_route(bench: Bench) -> list[Finding]:
    (a, b), (p, d) = bench.two_hosts(), nixl(bench)
    for spec, prefix, host in ((p, a, "10.77.0.1"), (d, b, "10.77.0.2")):
        spec.prefix = prefix
        spec.env.update(VLLM_NIXL_SIDE_CHANNEL_HOST=host, MASTER_ADDR="10.99.0.1", MASTER_PORT="29500")
        spec.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in spec.listens]
    return run(bench, p, d)


@fault("KVF023", "both wait for a rank 0 that took another port")
def nobody_listens_at_the_master_port(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    port = str(bench.port())
    for spec, role in ((p, "producer"), (d, "consumer")):
        spec.flag("--kv-transfer-config", None)
        spec.env.pop("VLLM_NIXL_SIDE_CHANNEL_PORT")
        spec.env.update(VLLM_DISTRIBUTED_KV_ROLE=role, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return run(bench, p, d)


@fault("KVF024", "decode connects to itself: engine id mismatch", needs="root")
def side_channel_host_is_not_set_on_two_hosts(bench: Bench) -> list[Finding]:
    (a, b), (p, d) = bench.two_hosts(), nixl(bench)
    p.prefix, d.prefix = a, b
    p.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in p.listens]
    d.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "10.77.0.2"
    return run(bench, p, d)


@fault("KVF024", "decode finds no metadata server on its own node")
def metadata_server_on_loopback_for_two_nodes(bench: Bench) -> list[Finding]:
    path = bench.file(
        "mooncake.json",
        {
            "prefill_url": "192.168.7.1:13003",
            "decode_url": "192.168.7.2:13003",
            "metadata_server": "etcd://127.0.0.1:2379",
            "protocol": "tcp",
            "device_name": "",
        },
    )
    return bench.examine(config=path, offline=True)


@fault("KVF024", "decode is sent to its own loopback")
def loopback_host_ip_for_two_nodes(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env.update(VLLM_NIXL_SIDE_CHANNEL_HOST="127.0.0.1")
    d.env.update(VLLM_NIXL_SIDE_CHANNEL_HOST="10.9.8.2")
    return bench.examine(prefill=[bench.env_file("p.env", p)], decode=[bench.env_file("d.env", d)])


@fault("KVF025", "each side goes to another machine for one name", needs="root")
def a_name_means_two_addresses(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    for spec, address in ((p, "127.0.1.1"), (d, "10.9.8.7")):
        hosts = bench.file(f"hosts.{address}", f"127.0.0.1 localhost\n{address} prefill-0\n")
        spec.prefix = in_mount_namespace(f"mount --bind {hosts} /etc/hosts")
    p.env["MASTER_ADDR"] = d.env["MASTER_ADDR"] = "prefill-0"
    return bench.examine(prefill=[bench.start(p)], decode=[bench.start(d)], offline=True)


@fault("KVF030", "peers are sent to a machine that is no longer there")
def host_ip_of_another_machine(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_HOST_IP"] = "10.9.8.1"
    return bench.examine(prefill=[bench.start(p)], decode=[bench.start(d)], offline=True)


@fault("KVF032", "packets vanish: the handshake times out", needs="root")
def packets_to_the_peer_are_lost(bench: Bench) -> list[Finding]:
    (a, b), (p, d) = bench.two_hosts(), nixl(bench)
    for spec, prefix, host in ((p, a, "10.77.0.1"), (d, b, "10.77.0.2")):
        spec.prefix = prefix
        spec.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = host
        spec.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in spec.listens]
    drop = ["ip", "route", "add", "blackhole", "10.77.0.1/32"]
    loss = ["tc", "qdisc", "add", "dev", "veth0", "root", "netem", "loss", "100%"]
    if subprocess.run([*b, *loss], capture_output=True, check=False).returncode != 0:
        subprocess.run([*b, *drop], check=True)
    return run(bench, p, d)


@fault("KVF032", "the second network of the node is down", needs="root")
def the_link_to_the_peer_is_down(bench: Bench) -> list[Finding]:
    (a, b), (p, d) = bench.two_hosts(), nixl(bench)
    for spec, prefix, host in ((p, a, "10.77.0.1"), (d, b, "10.77.0.2")):
        spec.prefix = prefix
        spec.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = host
        spec.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in spec.listens]
    pids = bench.start(p), bench.start(d)
    subprocess.run([*b, "ip", "route", "del", "10.77.0.0/24"], check=True)
    return bench.examine(prefill=[pids[0]], decode=[pids[1]])


@fault("KVF033", "decode connects to its own machine")
def wildcard_is_advertised(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "0.0.0.0"
    return run(bench, p, d)


@fault("KVF034", "each side binds on the other's address")
def urls_are_swapped(bench: Bench) -> list[Finding]:
    urls = {"prefill_url": "192.168.7.2:13003", "decode_url": "192.168.7.1:13003"}
    p, d, path = old_mooncake(bench, **urls, metadata_server="etcd://192.168.7.1:2379")
    p.env["VLLM_HOST_IP"], d.env["VLLM_HOST_IP"] = "192.168.7.1", "192.168.7.2"
    return bench.examine(
        prefill=[bench.env_file("p.env", p)], decode=[bench.env_file("d.env", d)], config=path, offline=True
    )


@fault("KVF031", "decode reaches its own bridge", needs="root")
def a_bridge_is_advertised(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    # The bridge lives in a namespace that only this process enters: the machine's own interfaces stay as they are.
    script = "ip link set lo up && ip link add docker0 type bridge && ip addr add 172.17.0.1/16 dev docker0"
    p.prefix = ["unshare", "-n", "sh", "-c", f'{script} && ip link set docker0 up && exec "$@"', "sh"]
    p.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "172.17.0.1"
    d.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = own_address()
    d.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in d.listens]
    p.listens = [x.replace("127.0.0.1", "0.0.0.0") for x in p.listens]
    return bench.examine(prefill=[bench.start(p)], decode=[bench.start(d)], offline=True)


@fault("KVF010", "stuck in drop_select, told by the config alone")
def one_port_in_mooncake_json(bench: Bench) -> list[Finding]:
    base = bench.port(20)
    _, _, path = old_mooncake(bench, prefill_url=f"127.0.0.1:{base}", decode_url=f"127.0.0.1:{base}")
    return bench.examine(config=path)


@fault("KVF032", "decode is sent to an address that nobody answers")
def advertised_address_is_nowhere(bench: Bench) -> list[Finding]:
    p, d = nixl(bench)
    p.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = "prefill-0.nowhere.invalid"
    d.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] = own_address()
    return bench.examine(prefill=[bench.env_file("p.env", p)], decode=[bench.env_file("d.env", d)])
