"""One half of one system in its own process, driven by lines of JSON on standard input.

`python -m kvferry.transfer.bench.worker '{"system": ..., "role": "owner"|"reader", ...}'`
"""

from __future__ import annotations

import json
import sys
from typing import Any

from kvferry.transfer.bench.cases import WARM_UP, Case, Plan, cases, clear, plan, timed, verify
from kvferry.transfer.bench.sockets import Socket
from kvferry.transfer.bench.systems import (
    KvferryCuda,
    KvferryNixl,
    KvferryShm,
    KvferryTcp,
    Memcpy,
    MooncakeTcp,
    NixlDefault,
    NixlTcp,
    Reader,
    System,
)
from kvferry.transfer.bench.turns import claim_output

_classes: tuple[type[System], ...] = (
    Memcpy,
    Socket,
    KvferryShm,
    KvferryTcp,
    KvferryCuda,
    KvferryNixl,
    MooncakeTcp,
    NixlDefault,
    NixlTcp,
)
SYSTEMS: dict[str, type[System]] = {system.name: system for system in _classes}


def main() -> None:
    """Run one half until standard input ends."""
    given = json.loads(sys.argv[1])
    sys.path += given["peers"]
    told = claim_output()

    def tell(value: Any) -> None:
        told.write(json.dumps(value) + "\n")
        told.flush()

    system = SYSTEMS[given["system"]]
    why_not = system.why_not()
    if why_not is not None:
        tell({"why_not": why_not})
        return
    if given["role"] == "owner":
        _own(system, given["nbytes"], tell)
    else:
        _read(system, given, tell)


def _own(system: type[System], nbytes: int, tell: Any) -> None:
    owner = system.owner(nbytes)
    tell(owner.hello())
    for line in sys.stdin:
        owner.meet(json.loads(line))
        tell({})
    owner.close()


def _read(system: type[System], given: dict[str, Any], tell: Any) -> None:
    reader = system.reader(given["nbytes"], given["hello"])
    tell(reader.answer())
    sys.stdin.readline()
    for name in given["cases"]:
        case = cases(given["nbytes"])[name]
        tell(_measure(reader, plan(case, given["nbytes"]), case, system.name))
    reader.close()


def _measure(reader: Reader, wanted: Plan, case: Case, system: str) -> dict[str, Any]:
    clear(reader.memory)
    seconds = timed(reader.prepare(wanted), case.repeats)
    if system in ("memcpy", "socket") and not case.is_latency:
        # These move the memory as it lies, in one piece.
        wanted = wanted._replace(source=wanted.target)
    moved = min(len(wanted.source), case.repeats + WARM_UP) if case.is_latency else None
    return {"case": case.name, "seconds": seconds, "verified": verify(reader.memory, wanted, moved)}


if __name__ == "__main__":
    main()
