"""A box between two hosts: carries IP packets between TUN devices of two network namespaces, and meddles with them.

    python middle_box.py NAMESPACE NAMESPACE MODE

`lossy` drops one packet in a hundred and delays the others by two milliseconds. `small` drops every packet of more than
thirty thousand bytes, as a path does whose real MTU is smaller than both ends believe. `quota` carries some megabytes
and then nothing. `flip` changes a byte in each large packet and mends the checksum, as a broken card with checksum
offload does.
"""

import collections
import ctypes
import fcntl
import os
import select
import struct
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
DELAY_S = 0.002
SMALL = 30000
LARGE = 30000
QUOTA = 24 << 20


def device_in(namespace: str) -> int:
    """A TUN device `net0` in a named network namespace; its file descriptor."""
    target = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(target, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.close(target)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"net0", IFF_TUN | IFF_NO_PI))
    return device


def flipped(packet: bytes) -> bytes:
    """One byte of a TCP payload changed, the checksum made to fit."""
    tcp = (packet[0] & 15) * 4
    at = tcp + len(packet) // 4 * 2  # Even, as the checksum adds words of two bytes.
    changed = bytearray(packet)
    changed[at] ^= 0x40
    (before,), (after,) = (struct.unpack_from("!H", p, at) for p in (packet, changed))
    (check,) = struct.unpack_from("!H", packet, tcp + 16)
    total = (~check & 0xFFFF) + (~before & 0xFFFF) + after
    total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into("!H", changed, tcp + 16, ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)
    return bytes(changed)


def main() -> None:
    mode = sys.argv[3]
    a, b = (device_in(name) for name in sys.argv[1:3])
    other = {a: b, b: a}
    waiting: collections.deque[tuple[float, int, bytes]] = collections.deque()
    count = carried = 0
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for device in select.select([a, b], [], [], pause)[0]:
            packet = os.read(device, 65536)
            count += 1
            if packet[0] >> 4 != 4 or (mode == "lossy" and count % 100 == 0):
                continue
            if mode == "small" and len(packet) > SMALL:
                continue
            carried += len(packet)
            if mode == "quota" and carried > QUOTA:
                continue
            if mode == "flip" and packet[9] == 6 and len(packet) > LARGE:
                packet = flipped(packet)
            due = time.monotonic() + (DELAY_S if mode == "lossy" else 0.0)
            waiting.append((due, other[device], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, device, packet = waiting.popleft()
            os.write(device, packet)


main()
