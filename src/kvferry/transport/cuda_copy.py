"""Copying scattered blocks with one GPU: tables of addresses, launches of bounded size, and the wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.errors import TransportError
from kvferry.layout import Offsets
from kvferry.transport import cuda_runtime as cuda
from kvferry.transport.checksum import COPY, COPY_AND_SUM, SUM, Sums
from kvferry.transport.copying import Limits
from kvferry.transport.cuda_direct import Direct, Slot
from kvferry.transport.cuda_kernels import LARGE_LAUNCH_BYTES, Launcher, Tile, is_aligned, tile_for
from kvferry.transport.cuda_lanes import Lane

Path = Literal["device", "peer", "host"]
RATES: dict[Path, float] = {"device": 2e12, "peer": 390e9, "host": 55e9}
"""Bytes a second that a copy hardly exceeds on an H200: until then sleeping costs nothing. Not learned from what was
seen: a copy that was slow once (a busy GPU) would have the next ones slept through, and so be seen as slow again."""

FIRST_LAUNCH_S = 50e-6
LONG_LAUNCH_S = 1.5e-3
"""Behind a launch that takes longer than this the next one waits, lest both take SMs; it runs beside a shorter one."""

RAMP_FROM_BLOCKS = 4096
TABLE_S_A_BLOCK = 2e-9
SLEEP_FROM_S = 300e-6
"""A copy that takes longer is waited for asleep where looking for it takes the GIL."""

SPIN_S = 1e-3
SMALL_BLOCK_BYTES = 16 << 10


class CudaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the copying takes and how it waits.

    A large launch runs at most `programs_*` programs of 512 threads, by where the far side of the copy lies: in the
    same GPU, in a peer, in host memory; four times as many where blocks are smaller than 16 KiB, of which a program
    moves fewer bytes a second. Few programs leave the SMs to the model (figures: docs/transfer-gpu.md).
    Launches below 32 MiB are over in less than 100 us and take up to `programs_small`.

    A kernel that runs can't be stopped: a launch moves at most `launch_bytes` or what takes `launch_s`, and at most
    two are under way. The kernel reads the table of a small launch of up to `direct_blocks` blocks from host memory;
    others are uploaded first, for a persistent program would wait for each entry. The wait for a copy sleeps until it
    can be complete, then looks all the time for `spin_s`, then every `sleep_s`. A copy of up to `awake_s` is waited for
    without sleep and without the GIL: asleep, a core loses its caches and its clock, so that the next read begins some
    25 us later, and more where it is slow (docs/transfer-gpu.md).
    """

    programs_device: int = 264
    programs_peer: int = 16
    programs_host: int = 8
    programs_small: int = 132
    launch_bytes: int = 1 << 30
    launch_s: float = 3e-3
    table_blocks: int = 65536
    direct_blocks: int = 2048
    lanes: int = 4
    spin_s: float = 300e-6
    awake_s: float = 4e-3
    sleep_s: float = 50e-6
    stuck_after_s: float = 30.0


class Run(NamedTuple):
    """`nbytes` from each source to each target; int64 [n]: offsets to which the bases (one, or one each) are added."""

    source_offsets: Offsets
    source_base: int | Offsets
    target_offsets: Offsets
    target_base: int | Offsets
    nbytes: int
    path: Path


class BlockCopier:
    """Copies with one device's SMs. Thread-safe: each copy has a lane of its own, later ones wait for one.

    `stuck` is set once a copy did not finish: then nothing that its kernels may touch can be released.
    """

    def __init__(self, device: int, settings: CudaSettings) -> None:
        self.device = device
        self.stuck = False
        self._settings = settings
        self._launcher = Launcher()
        self._direct = Direct.open(self._launcher, cuda.DRIVER)
        self._free: list[Lane] = []
        self._num_lanes = 0
        self._changed = threading.Condition()
        self.programs: dict[Path, int] = {
            "device": settings.programs_device,
            "peer": settings.programs_peer,
            "host": settings.programs_host,
        }

    def warm(self, *modes: int) -> None:
        """Compile the usual kernels for copies, or for these modes, and make the first lane."""
        with cuda.use(self.device):
            for nbytes in (65536, 16384):
                for total in (0, LARGE_LAUNCH_BYTES):
                    for mode in modes or (COPY,):
                        self._launcher.warm(nbytes, total, mode)
        self._put_lane(self._take_lane(None))

    def copy(
        self,
        runs: list[Run],
        limits: Limits,
        *,
        check: Callable[[], None] = lambda: None,
        word: int | None = None,
        tile: Tile | None = None,
        sums: Sequence[Sums] | None = None,
    ) -> int:
        """Copy all runs; return when every byte is in place, with the 8 bytes at address `word` loaded after that.

        Args:
            check: looked at between launches and at the end; raises to end the copy (a peer is dead, a link closed).
            word: an address that the device reads, or None (then 0 is returned).
            sums: int64 [n] for each run: take the blocks' checksums of what was read into these.
        Raises:
            HandoffAborted, TransferTimeout: by `limits`.
            TransportError: the GPU failed, or did not finish within `stuck_after_s`.
        After failure: some blocks are copied, some are not; none will be, for what was launched is waited for (T4).
        """
        return self._launch_all(runs, limits, COPY if sums is None else COPY_AND_SUM, check, word, tile, sums)

    def sum(self, runs: list[Run], limits: Limits, sums: Sequence[Sums]) -> None:
        """Take the checksums of the runs' source blocks into `sums`, int64 [n] for each run; nothing is written.

        Raises: as `copy` does.
        """
        self._launch_all(runs, limits, SUM, lambda: None, None, None, sums)

    def _launch_all(
        self,
        runs: list[Run],
        limits: Limits,
        mode: int,
        check: Callable[[], None],
        word: int | None,
        tile: Tile | None,
        sums: Sequence[Sums] | None,
    ) -> int:
        lane = self._take_lane(limits)
        before = cuda.enter(self.device)
        try:
            half = 0
            try:
                for number, run in enumerate(runs):
                    for first, last in self._parts(run):
                        if lane.busy[half]:
                            self._await(lane, half)
                            check()
                        limits.check()
                        out = None if sums is None else sums[number][first:last]
                        self._launch(lane, half, run, first, last, mode, tile, out)
                        half ^= 1
                if word is not None:
                    self._load_word(lane, half ^ 1, word)
            finally:
                self._await(lane, half)
                self._await(lane, half ^ 1)
            check()
            return int(lane.word.values[0]) if word is not None else 0
        finally:
            cuda.leave(before, self.device)
            # A lane whose work may still run is never used again: its table is being read.
            if not (lane.busy[0] or lane.busy[1]):
                self._put_lane(lane)

    def _load_word(self, lane: Lane, half: int, word: int) -> None:
        """On the stream of the half launched last, behind the copies of both; that half's event moves behind it."""
        slot = lane.slots[half][False][lane.busy[half ^ 1]]
        lane.busy[half] = True
        try:
            if self._direct is None or not self._direct.load_word(word, lane.word.address, slot):
                if slot.behind:
                    cuda.wait_for(slot.stream, lane.done[half ^ 1])
                self._launcher.load_word(word, lane.word.address, stream=slot.stream)
                cuda.record(lane.done[half], slot.stream)
        except BaseException:
            self._record_what_began(lane, half)
            raise

    def _record_what_began(self, lane: Lane, half: int) -> None:
        """A start failed, perhaps behind its launch: move the event there, so that it is waited for (T4).

        Where not even that can be done, nothing that the launch may touch is released.
        """
        try:
            cuda.record(lane.done[half], lane.streams[half])
        except TransportError:
            self.stuck = True

    def close(self) -> None:
        """Free the lanes; no copy may be running."""
        with cuda.use(self.device):
            while self._free:
                self._free.pop().close()

    def _parts(self, run: Run) -> Iterator[tuple[int, int]]:
        """First and last index of each launch.

        Of a long table the first launch is short, so that the GPU works while the rest is written; later ones grow.
        """
        settings, n, rate = self._settings, len(run.source_offsets), RATES[run.path]
        most = min(
            settings.table_blocks, max(1, int(min(settings.launch_bytes, rate * settings.launch_s) // run.nbytes))
        )
        if n <= min(most, RAMP_FROM_BLOCKS) or (n <= most and n * run.nbytes <= LARGE_LAUNCH_BYTES):
            yield 0, n
            return
        # The next table must be written while a launch runs.
        growth = max(2, int(run.nbytes / rate / TABLE_S_A_BLOCK))
        blocks = most if n <= RAMP_FROM_BLOCKS else max(1, int(rate * FIRST_LAUNCH_S) // run.nbytes)
        first = 0
        while first < n:
            blocks = min(blocks, most)
            last = n if n - first <= min(most, blocks + blocks // 4) else first + blocks
            yield first, last
            first, blocks = last, blocks * growth

    def _launch(
        self, lane: Lane, half: int, run: Run, first: int, last: int, mode: int, tile: Tile | None, out: Sums | None
    ) -> None:
        n, other = last - first, half ^ 1
        nbytes = n * run.nbytes
        small = nbytes < LARGE_LAUNCH_BYTES
        waits = lane.busy[other] and lane.takes_s[other] > LONG_LAUNCH_S
        slot = lane.slots[half][not small or n > self._settings.direct_blocks][waits]
        shape = tile or tile_for(run.nbytes, nbytes)
        programs = self._settings.programs_small if small else self._programs_for(run)
        direct = self._direct if mode == COPY else None
        lane.busy[half], lane.behind[half] = True, waits
        try:
            if direct is None or not direct.start(run, first, last, slot, shape, programs):
                self._start(lane, half, run, first, last, mode, slot, shape, programs, out)
        except BaseException:
            self._record_what_began(lane, half)
            raise
        now = time.perf_counter()
        takes_s = lane.takes_s[half] = nbytes / RATES[run.path]
        lane.due_s[half] = (max(now, lane.due_s[other]) if lane.busy[other] else now) + takes_s

    def _start(
        self,
        lane: Lane,
        half: int,
        run: Run,
        first: int,
        last: int,
        mode: int,
        slot: Slot,
        tile: Tile,
        programs: int,
        out: Sums | None,
    ) -> None:
        """Step by step."""
        n, stream = last - first, slot.stream
        table = lane.table_of(half)[: 2 * n]
        _add(run.source_offsets, run.source_base, first, last, table[:n])
        _add(run.target_offsets, run.target_base, first, last, table[n:])
        if slot.on_device:
            cuda.upload(slot.on_device, slot.table, 16 * n, stream)
        if slot.behind:
            cuda.wait_for(stream, lane.done[half ^ 1])
        sums = 0 if out is None else lane.with_sums().begin(half, n, stream)
        self._launcher.copy(
            slot.on_device or slot.table,
            n,
            run.nbytes,
            mode=mode,
            sums=sums,
            aligned=is_aligned(table),
            programs=programs,
            stream=stream,
            tile=tile,
        )
        if out is not None:
            lane.with_sums().end(half, out, stream)
        cuda.record(lane.done[half], stream)

    def _programs_for(self, run: Run) -> int:
        return self.programs[run.path] * (1 if run.nbytes >= SMALL_BLOCK_BYTES else 4)

    def _await(self, lane: Lane, half: int) -> None:
        """Return when nothing that `half` of the lane launched is running any more."""
        if not lane.busy[half]:
            return
        other = half ^ 1
        if not self._is_done(lane, half, 0.0):
            # With another long launch behind this one the GPU has work meanwhile.
            hurry = not lane.busy[other] or lane.takes_s[other] < self._settings.spin_s
            self._poll(lane, half, hurry)
        lane.busy[half] = False
        if lane.sums is not None:
            lane.sums.take(half)
        if lane.busy[other] and lane.behind[other]:
            lane.due_s[other] = max(lane.due_s[other], time.perf_counter() + lane.takes_s[other])

    def _is_done(self, lane: Lane, half: int, seconds: float) -> bool:
        """Whether what was launched is complete; looks for up to so long, where that leaves the GIL to others."""
        if self._direct is None:
            return cuda.is_done(lane.done[half])
        return self._direct.wait(lane.done_handles[half], min(max(seconds, 0.0), SPIN_S))

    def _poll(self, lane: Lane, half: int, hurry: bool) -> None:
        settings, due = self._settings, lane.due_s[half]
        now = started = time.perf_counter()
        spin_until = max(due, started) + settings.spin_s if hurry else 0.0
        # A sleep ends late, by some 60 us on Linux.
        awake_s = settings.awake_s if self._direct is not None and hurry else SLEEP_FROM_S
        if (ahead := due - started) > awake_s:
            time.sleep(ahead - awake_s / 2)
            now = time.perf_counter()
        while not self._is_done(lane, half, spin_until - now):
            now = time.perf_counter()
            if now - started > settings.stuck_after_s:
                self.stuck = True
                raise TransportError(
                    f"the GPU did not finish a copy within {settings.stuck_after_s:.0f} s: another kernel keeps it, "
                    "or it hangs. The target blocks may still be written: restart this process"
                )
            if now > spin_until:
                time.sleep(settings.sleep_s)

    def _take_lane(self, limits: Limits | None) -> Lane:
        if self.stuck:
            raise TransportError("an earlier copy never finished on this GPU; restart this process")
        with self._changed:
            while True:
                if self._free:
                    return self._free.pop()
                if self._num_lanes < self._settings.lanes:
                    self._num_lanes += 1
                    break
                self._changed.wait(0.01)
                if limits is not None:
                    limits.check()
        try:
            with cuda.use(self.device):
                return Lane(self._settings.table_blocks)
        except BaseException:
            # Out of memory now, perhaps not later: the next copy may try again instead of waiting for this lane.
            with self._changed:
                self._num_lanes -= 1
                self._changed.notify()
            raise

    def _put_lane(self, lane: Lane) -> None:
        with self._changed:
            self._free.append(lane)
            self._changed.notify()


def _add(offsets: Offsets, base: int | Offsets, first: int, last: int, out: npt.NDArray[np.int64]) -> None:
    np.add(offsets[first:last], base if isinstance(base, int) else base[first:last], out=out)
