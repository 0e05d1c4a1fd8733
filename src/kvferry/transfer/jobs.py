"""Running transfers on threads: greater priority first, bounded threads, bytes and transfers a peer."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from kvferry.errors import TransportClosed
from kvferry.transport.base import StopToken


class Job:
    """One transfer: `step()` moves a slice and says whether more is left. `finish(error)` is called exactly once."""

    def __init__(
        self,
        *,
        peer: object,
        priority: int,
        nbytes: int,
        step: Callable[[], bool],
        finish: Callable[[BaseException | None], None],
        stop: StopToken,
    ) -> None:
        self.peer, self.priority, self.nbytes = peer, priority, nbytes
        self.step, self.finish, self.stop = step, finish, stop


class JobQueue:
    """Jobs waiting and running. Threads start when there is work and end with the queue."""

    def __init__(self, *, threads: int, per_peer: int, max_bytes: int) -> None:
        self._most_threads, self._per_peer, self._max_bytes = threads, per_peer, max_bytes
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, Job]] = []
        self._order = itertools.count()
        self._running: set[Job] = set()
        self._by_peer: Counter[int] = Counter()
        self._bytes = 0
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    @property
    def bytes_in_flight(self) -> int:
        return self._bytes

    def submit(self, job: Job) -> None:
        """Queue a job. Raises: TransportClosed after `close`."""
        with self._changed:
            if self._closed:
                raise TransportClosed("the transfer engine is closed")
            self._push(job)
            if self._idle == 0 and len(self._threads) < self._most_threads:
                name = f"kvferry-transfer-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                self._threads.append(thread)
                thread.start()
            else:
                self._changed.notify()

    def drop(self, job: Job) -> bool:
        """Take a waiting job out, so that it never runs; False if it runs or has run (`finish` is its own)."""
        with self._changed:
            for index, (_rank, _order, waiting) in enumerate(self._waiting):
                if waiting is job:
                    del self._waiting[index]
                    heapq.heapify(self._waiting)
                    return True
        return False

    def close(self) -> None:
        """Stop running jobs, fail waiting ones, join the threads. Idempotent."""
        with self._changed:
            self._closed = True
            waiting, self._waiting = [job for _, _, job in self._waiting], []
            for job in self._running:
                job.stop.set()
            self._changed.notify_all()
        for job in waiting:
            job.finish(TransportClosed("the transfer engine was closed while this transfer waited"))
        for thread in self._threads:
            thread.join()

    def _push(self, job: Job) -> None:
        heapq.heappush(self._waiting, (-job.priority, next(self._order), job))

    def _take(self) -> Job | None:
        """The first waiting job that the bounds admit; waits for one; None once closed."""
        while not self._closed:
            refused: list[Any] = []
            found: Job | None = None
            while self._waiting and found is None:
                entry = heapq.heappop(self._waiting)
                if self._admits(entry[2]):
                    found = entry[2]
                else:
                    refused.append(entry)
            for entry in refused:
                heapq.heappush(self._waiting, entry)
            if found is not None:
                self._running.add(found)
                self._by_peer[id(found.peer)] += 1
                self._bytes += found.nbytes
                return found
            self._idle += 1
            self._changed.wait()
            self._idle -= 1
        return None

    def _admits(self, job: Job) -> bool:
        within = self._bytes == 0 or self._bytes + job.nbytes <= self._max_bytes
        return within and self._by_peer[id(job.peer)] < self._per_peer

    def _work(self) -> None:
        while True:
            with self._changed:
                job = self._take()
            if job is None:
                return
            error: BaseException | None = None
            more = False
            try:
                more = job.step()
            except Exception as raised:  # noqa: BLE001  (handed to whoever awaits the transfer)
                error = raised
            with self._changed:
                self._running.discard(job)
                self._by_peer[id(job.peer)] -= 1
                self._by_peer += Counter()
                self._bytes -= job.nbytes
                if more and not self._closed:
                    # Back into the queue between slices, so that a greater priority can go first.
                    self._push(job)
                self._changed.notify_all()
            if not more or error is not None:
                job.finish(error)
            elif self._closed:
                job.finish(TransportClosed("the transfer engine was closed during this transfer"))
