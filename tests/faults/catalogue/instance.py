"""A stand-in for an instance: listens where it is told, answers everything with one body, and waits to be ended.

Its command line, environment, sockets, limits and namespaces are real, and those are what the doctor reads.

    python instance.py ["host:port ..."] [seconds ahead] [open files] [body] -- vllm serve ...
"""

import contextlib
import email.utils
import os
import select
import socket
import sys
import time

listeners = []
for place in sys.argv[1].split():
    host, _, port = place.rpartition(":")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, int(port)))
    listener.listen(16)
    listeners.append(listener)
ahead = float(sys.argv[2])
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(int(sys.argv[3]))]
body = sys.argv[4].encode()
sys.stdout.write("ready\n")
sys.stdout.flush()
while True:
    for listener in select.select(listeners, [], [])[0]:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(0.5)
            connection.recv(4096)
            date = email.utils.formatdate(time.time() + ahead, usegmt=True)
            connection.sendall(
                f"HTTP/1.0 200 OK\r\nDate: {date}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
