"""One round of one system in a process of its own: `python -m kvferry.pool.bench.worker '{"system": ..., ...}'`.

Says one JSON object a case on standard output.
"""

from __future__ import annotations

import json
import os
import sys

from kvferry.pool.bench.cases import CASES, Scale
from kvferry.pool.bench.lmcache import LMCache
from kvferry.pool.bench.ours import Kvferry, KvferryRedis, KvferryTcp
from kvferry.pool.bench.peers import Fio, Mooncake, Redis
from kvferry.pool.bench.stores import Memcpy, System
from kvferry.transfer.bench.turns import claim_output

_classes: tuple[type[System], ...] = (Memcpy, Fio, Kvferry, KvferryTcp, KvferryRedis, Mooncake, Redis, LMCache)
SYSTEMS: dict[str, type[System]] = {system.name: system for system in _classes}


def main() -> None:
    """Run the round. Raises: whatever the system raises."""
    given = json.loads(sys.argv[1])
    sys.path += given["peers"]
    told = claim_output()
    system = SYSTEMS[given["system"]]
    why_not = system.why_not()
    if why_not is not None:
        told.write(json.dumps({"why_not": why_not}) + "\n")
    else:
        cases = [CASES[name] for name in given["cases"] if CASES[name].kind in system.kinds]
        for result in system().measure(cases, Scale(**given["scale"])):
            told.write(json.dumps(result._asdict()) + "\n")
    told.flush()
    # Some peers' threads do not end by themselves.
    os._exit(0)


if __name__ == "__main__":
    main()
