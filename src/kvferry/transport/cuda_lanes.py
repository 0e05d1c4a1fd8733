"""What one copy on a GPU needs while it is under way: streams, events, tables, room for checksums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.transport import cuda_runtime as cuda
from kvferry.transport.checksum import Sums
from kvferry.transport.cuda_direct import Slot


class Lane:
    """What one copy needs: two halves of a table, so that one is filled while the other is read, each with a stream,
    so that neither its upload nor a launch beside a short one waits for the other half's."""

    def __init__(self, table_blocks: int) -> None:
        self.streams = (cuda.new_stream(), cuda.new_stream())
        self.done = (cuda.new_event(), cuda.new_event())
        self.done_handles = (int(self.done[0]), int(self.done[1]))
        self.busy = [False, False]
        self.due_s = [0.0, 0.0]
        self.takes_s = [0.0, 0.0]
        self.behind = [False, False]
        self.capacity = table_blocks
        self.table = cuda.PinnedArray(4 * table_blocks)
        self.device_table = cuda.allocate(32 * table_blocks)
        self.word = cuda.PinnedArray(2)
        self.sums: LaneSums | None = None
        # By half, whether the table is uploaded, and whether the launch comes behind the other half's.
        self.slots = [
            [[self._slot(half, up, behind) for behind in (False, True)] for up in (False, True)] for half in (0, 1)
        ]

    def _slot(self, half: int, uploaded: bool, behind: bool) -> Slot:
        at = 16 * half * self.capacity
        return Slot(
            self.table.address + at,
            self.device_table + at if uploaded else 0,
            self.streams[half],
            self.done_handles[half ^ 1] if behind else 0,
            self.done_handles[half],
        )

    def table_of(self, half: int) -> npt.NDArray[np.int64]:
        """The half's table in host memory, int64 [2 * capacity]."""
        at = 2 * half * self.capacity
        return self.table.values[at : at + 2 * self.capacity]

    def with_sums(self) -> LaneSums:
        """Room for checksums; made on first use."""
        if self.sums is None:
            self.sums = LaneSums(self.capacity)
        return self.sums

    def close(self) -> None:
        for event, stream in zip(self.done, self.streams, strict=True):
            cuda.destroy_event(event)
            cuda.destroy_stream(stream)
        cuda.free(self.device_table)
        self.table.close()
        self.word.close()
        if self.sums is not None:
            self.sums.close()


class LaneSums:
    """Where launches add up checksums, two halves as the table has, and what each half's go to once it is complete."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._on_device = cuda.allocate(16 * capacity)
        self._on_host = cuda.PinnedArray(2 * capacity)
        self._wanted: list[Sums | None] = [None, None]

    def begin(self, half: int, n: int, stream: int) -> int:
        """The address of n zeros."""
        address = self._on_device + 8 * half * self._capacity
        cuda.zero(address, 8 * n, stream)
        return address

    def end(self, half: int, out: Sums, stream: int) -> None:
        """Bring what was added up to the host, behind the launch; `take` then puts it into `out`."""
        at = half * self._capacity
        cuda.download(self._on_host.address + 8 * at, self._on_device + 8 * at, out.nbytes, stream)
        self._wanted[half] = out

    def take(self, half: int) -> None:
        """The launch of this half is complete."""
        out, self._wanted[half] = self._wanted[half], None
        if out is not None:
            at = half * self._capacity
            out[:] = self._on_host.values[at : at + len(out)]

    def close(self) -> None:
        cuda.free(self._on_device)
        self._on_host.close()
