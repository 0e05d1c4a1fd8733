"""Runs of many layers as few: one launch instead of one a layer, and its checksums back to the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kvferry.layout import Offsets
from kvferry.transport.checksum import Sums
from kvferry.transport.cuda_copy import Path, Run


def merged(runs: list[Run]) -> list[Run]:
    """The same copies, those of one size and path in one run."""
    if len(runs) <= 1:
        return runs
    return [
        Run(
            np.concatenate([run.source_offsets for run in group]),
            _bases([run.source_base for run in group], group),
            np.concatenate([run.target_offsets for run in group]),
            _bases([run.target_base for run in group], group),
            group[0].nbytes,
            group[0].path,
        )
        for group in ([runs[number] for number in numbers] for numbers in _groups(runs))
    ]


def parted(runs: list[Run], of_merged: Sequence[Sums], out: Sequence[Sums]) -> None:
    """Bring the checksums of `merged(runs)` into those of the runs, `out`."""
    for sums, numbers in zip(of_merged, _groups(runs), strict=True):
        at = 0
        for number in numbers:
            out[number][:] = sums[at : at + len(out[number])]
            at += len(out[number])


def _groups(runs: list[Run]) -> list[list[int]]:
    groups: dict[tuple[int, Path], list[int]] = {}
    for number, run in enumerate(runs):
        groups.setdefault((run.nbytes, run.path), []).append(number)
    return list(groups.values())


def _bases(bases: list[Any], group: list[Run]) -> int | Offsets:
    if all(base == bases[0] for base in bases):
        return int(bases[0])
    return np.repeat(np.array(bases, dtype=np.int64), [len(run.source_offsets) for run in group])
