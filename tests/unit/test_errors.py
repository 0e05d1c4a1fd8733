"""What an error says of itself."""

from __future__ import annotations

import errno
import socket

from kvferry.errors import KVError, PeerGone, TransferUnfinished, system_reason


def test_an_error_says_who_and_where_once() -> None:
    assert str(PeerGone("gone")) == "gone"
    assert str(PeerGone("gone", peer="p-0", request_id="r-1", stage="pulling")) == (
        "gone [request r-1, peer p-0, stage pulling]"
    )
    assert str(PeerGone("cannot connect to tcp://h:1", peer="tcp://h:1")) == "cannot connect to tcp://h:1"
    assert str(KVError("the decode instance left", stage="decode")) == "the decode instance left [stage decode]"


def test_a_cause_is_the_class_in_one_word() -> None:
    assert (PeerGone("").cause, TransferUnfinished("", is_over=bool).cause) == ("peer_gone", "transfer_unfinished")


def test_the_systems_reason_is_told_without_numbers_and_addresses() -> None:
    refused = ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 9)")
    assert system_reason(refused) == "Connection refused"
    assert system_reason(socket.gaierror(socket.EAI_NONAME, "Name or service not known")) == "Name or service not known"
    assert system_reason(OSError("Multiple exceptions: a, b")) == "Multiple exceptions: a, b"
    assert system_reason(TimeoutError()) == "TimeoutError"
