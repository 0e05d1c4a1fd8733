"""Where a handoff's milliseconds go, from the traces of vllm_pd.py --trace, whose report it is a part of.

    python bench/gpu/vllm_timeline.py trace-P.txt trace-D.txt 1000,8000,30000 [REPEATS]

Requests came one after the other; for each prompt length some to warm up with (`num_warm`), then the measured ones.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

Moments = dict[str, float]


def num_warm(num_tokens: int) -> int:
    """Requests before the measured ones: for connections, kernels, and a GPU's clocks."""
    return 4 if num_tokens < 10000 else 1


SPANS = {
    "source: request known to forward enqueued": (("P", "new"), ("P", "enqueued")),
    "source: forward enqueued to last chunk published": (("P", "enqueued"), ("P", "published")),
    "last chunk published to target's blocks verified": (("P", "published"), ("D", "exposed")),
    "verified to scheduled (vLLM's steps)": (("D", "exposed"), ("D", "scheduled")),
    "target: scheduled to first token": (("D", "scheduled"), ("D", "finished")),
}


def read(path: Path) -> list[Moments]:
    """Each request's last moment of each kind, requests in order; those without a handoff are left out."""
    requests: dict[str, Moments] = {}
    for line in path.read_text().splitlines():
        seconds, _, request, what = line.split(" ", 3)
        requests.setdefault(request, {})[what.split(" ")[0]] = float(seconds)
    return [moments for moments in requests.values() if {"published", "exposed"} & set(moments)]


def rows(source: list[Moments], target: list[Moments], prompts: list[int], repeats: int) -> list[dict[str, object]]:
    """Medians over the requests of each prompt length, in ms."""
    found: list[dict[str, object]] = []
    last = 0
    for num_tokens in prompts:
        first = last + num_warm(num_tokens)
        last = first + repeats
        spans: dict[str, float] = {}
        for name, ((from_side, from_what), (to_side, to_what)) in SPANS.items():
            values = []
            for p, d in zip(source[first : first + repeats], target[first : first + repeats], strict=True):
                sides = {"P": p, "D": d}
                values.append(sides[to_side][to_what] - sides[from_side][from_what])
            spans[name] = round(statistics.median(values) * 1e3, 2)
        found.append({"section": "timeline", "system": "kvferry", "prompt": num_tokens, "ms": spans})
    return found


def timeline(source: Path, target: Path, prompts: list[int], repeats: int) -> list[dict[str, object]]:
    """Rows out of the two files."""
    return rows(read(source), read(target), prompts, repeats)


def main(arguments: list[str]) -> int:
    prompts = [int(n) for n in arguments[2].split(",")]
    repeats = int(arguments[3]) if len(arguments) > 3 else 5
    print(json.dumps(timeline(Path(arguments[0]), Path(arguments[1]), prompts, repeats), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
