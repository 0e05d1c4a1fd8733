"""Starting copies by one call of `_gpu.c` each, where it was built and the driver is as it expects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvferry.errors import TransportError
from kvferry.transport.cuda_kernels import Launcher, Tile, num_tiles

if TYPE_CHECKING:
    from kvferry.transport.cuda_copy import Run

try:
    from kvferry.transport import _gpu  # type: ignore[attr-defined, unused-ignore]

    in_c: Any = _gpu
except ImportError:  # The wheel was built without a C compiler.
    in_c = None

PARAMETERS, WORD_PARAMETERS = (8, 8, 4, 8, 8, 8), (8, 8, 8, 8)
"""Bytes of the copy kernel's (table, sums, n, nbytes) and of `load_word`'s (word, slot), each with two pointers of
Triton's own, which not every version has."""


class Slot(NamedTuple):
    """Where one launch puts its table, and the stream and events of it, as integers; 0 for none.

    `table` is the address in pinned host memory, `on_device` where it is uploaded to, `behind` an event to wait for.
    """

    table: int
    on_device: int
    stream: int
    behind: int
    done: int


class Direct:
    """One device's. The calling thread's current device must be this one."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._kernels: dict[Tile, tuple[int, int, int] | None] = {}
        self._word_kernels: dict[int, int] = {}

    @classmethod
    def open(cls, launcher: Launcher, driver: str) -> Direct | None:
        """None where the C part, or what it needs of the driver (the library's name), is missing."""
        if in_c is None:
            return None
        try:
            in_c.open(driver)
        except OSError:
            return None
        return cls(launcher)

    def start(self, run: Run, first: int, last: int, slot: Slot, tile: Tile, programs: int) -> bool:
        """Start copying blocks [first, last) with a kernel. False, and nothing is started, where this can't be used.

        Raises: TransportError where the GPU refuses.
        """
        if tile in self._kernels:
            kernel = self._kernels[tile]
        else:
            kernel = self._kernels[tile] = self._find(tile)
        if kernel is None:
            return False
        function, threads, shared = kernel
        grid = min(programs, num_tiles(last - first, run.nbytes, tile, 4))
        try:
            return bool(in_c.start(*run[:4], first, last, run.nbytes, *slot, function, grid, threads, shared))
        except RuntimeError as error:
            raise TransportError(str(error)) from error

    def load_word(self, word: int, to: int, slot: Slot) -> bool:
        """Start loading the 8 bytes at address `word` into pinned host memory at `to`, a multiple of 16. False, and
        nothing is started, where this can't be used.

        Raises: TransportError where the GPU refuses.
        """
        low = word & 15
        if (function := self._word_kernels.get(low)) is None:
            function = self._launcher.word_handle(low)
            if not _as_expected(function, WORD_PARAMETERS, 2):
                function = 0
            self._word_kernels[low] = function
        if not function:
            return False
        try:
            in_c.start_word(word, to, slot.stream, slot.behind, slot.done, function)
        except RuntimeError as error:
            raise TransportError(str(error)) from error
        return True

    def wait(self, event: int, seconds: float) -> bool:
        """Look at the event for so long, without the GIL; whether all work before it is complete.

        Raises: TransportError if a kernel failed.
        """
        try:
            return bool(in_c.wait(event, seconds))
        except RuntimeError as error:
            raise TransportError(f"{error}; this process's CUDA context is broken, restart it") from error

    def _find(self, tile: Tile) -> tuple[int, int, int] | None:
        """(function, threads, bytes of shared memory) of the kernel that copies aligned blocks."""
        function, threads, shared = self._launcher.handle(tile)
        return (function, threads, shared) if _as_expected(function, PARAMETERS, 4) else None


def _as_expected(function: int, sizes: tuple[int, ...], at_least: int) -> bool:
    found = tuple(in_c.param_sizes(function))
    return len(found) >= at_least and found == sizes[: len(found)]
