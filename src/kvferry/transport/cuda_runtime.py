"""The CUDA runtime calls that the cuda transport needs, with errors mapped to the error tree.

Addresses, streams and events are integers here. A call works on the calling thread's current device: `use` sets it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.errors import RegistrationError, TransportError

try:
    from cuda.bindings import driver, runtime
except ImportError as missing:  # The caller learns it as "not installed"; torch for CUDA brings the package.
    raise ImportError(
        f"cuda-bindings is needed for the cuda transport ({missing}); pip install cuda-bindings"
    ) from missing

DRIVER = "libcuda.so.1"
HANDLE_BYTES = 64


def call(function: Any, *args: Any) -> Any:
    """Call one function of the runtime or the driver; its value, a tuple of values, or None.

    Raises: TransportError with the function's name and CUDA's error.
    """
    status, *values = function(*args)
    if int(status):
        name = getattr(function, "__name__", str(function))
        raise TransportError(f"{name} failed: {getattr(status, 'name', status)}")
    return None if not values else values[0] if len(values) == 1 else tuple(values)


def enter(device: int) -> int:
    """Make `device` the calling thread's current device; the former one, for `leave`."""
    before = int(runtime.cudaGetDevice()[1])
    if before != device:
        call(runtime.cudaSetDevice, device)
    return before


def leave(before: int, device: int) -> None:
    """Undo `enter`."""
    if before != device:
        call(runtime.cudaSetDevice, before)


@contextmanager
def use(device: int) -> Iterator[None]:
    """Make `device` the calling thread's current device, and the former one again afterwards."""
    before = enter(device)
    try:
        yield
    finally:
        leave(before, device)


def device_uuids() -> list[str]:
    """The visible devices' UUIDs in hex, by ordinal: what names a GPU the same way in every process.

    Raises: TransportError if there is no GPU or no driver.
    """
    count = call(runtime.cudaGetDeviceCount)
    if not count:
        raise TransportError("no CUDA device is visible to this process; look at CUDA_VISIBLE_DEVICES")
    return [bytes(call(runtime.cudaGetDeviceProperties, i).uuid.bytes).hex() for i in range(count)]


class IpcHandle(NamedTuple):
    """How another process opens an allocation, and where in it an address lies."""

    handle: bytes
    offset: int


def ipc_handle(address: int, nbytes: int, device: int) -> IpcHandle:
    """The handle of the allocation that holds device memory [address, address + nbytes).

    Raises: RegistrationError where the memory cannot be shared.
    """
    with use(device):
        call(runtime.cudaFree, 0)  # creates the context where there is none yet
        try:
            base, size = call(driver.cuMemGetAddressRange, address)
            handle = bytes(call(runtime.cudaIpcGetMemHandle, address).reserved)
        except TransportError as error:
            raise RegistrationError(
                f"device memory at {address:#x} cannot be shared with other processes ({error.message}); allocate it "
                "with cudaMalloc: PYTORCH_CUDA_ALLOC_CONF must not have expandable_segments:True"
            ) from error
    if address + nbytes > int(base) + int(size):
        raise RegistrationError(f"{nbytes} bytes at {address:#x} span more than one device allocation")
    return IpcHandle(handle, address - int(base))


def open_ipc_handle(handle: bytes) -> int:
    """Map another process's allocation for the current device; its first address. Opening again counts references.

    The *reading* device must be current: torch's own IPC opens it on the owner's, and the kernel then cannot reach it.
    """
    opened = runtime.cudaIpcMemHandle_t()
    opened.reserved = handle
    return int(call(runtime.cudaIpcOpenMemHandle, opened, runtime.cudaIpcMemLazyEnablePeerAccess))


def close_ipc_handle(address: int) -> None:
    call(runtime.cudaIpcCloseMemHandle, address)


def enable_peer_access(device: int) -> None:
    """Let the current device reach `device`'s memory of this same process."""
    status = runtime.cudaDeviceEnablePeerAccess(device, 0)[0]
    if int(status) and status != runtime.cudaError_t.cudaErrorPeerAccessAlreadyEnabled:
        raise TransportError(f"device {device} cannot be reached from here: {status.name}; use another transport")
    if int(status):
        runtime.cudaGetLastError()  # else the next check of this thread would find it


def pin(address: int, nbytes: int, *, read_only: bool = False) -> bool:
    """Make host memory readable and writable for every GPU, at its own address. False if it was so already.

    Args:
        read_only: this process may only read it, and so will the GPUs.
    Raises: RegistrationError where the system refuses.
    """
    kind = runtime.cudaPointerGetAttributes(address)
    if not int(kind[0]) and kind[1].type == runtime.cudaMemoryType.cudaMemoryTypeHost:
        return False
    flags = runtime.cudaHostRegisterPortable | runtime.cudaHostRegisterMapped
    if read_only:
        flags |= runtime.cudaHostRegisterReadOnly
    try:
        call(runtime.cudaHostRegister, address, nbytes, flags)
    except TransportError as error:
        runtime.cudaGetLastError()
        raise RegistrationError(f"{nbytes} bytes of host memory cannot be pinned: {error.message}") from error
    return True


def unpin(address: int) -> None:
    call(runtime.cudaHostUnregister, address)


class PinnedArray:
    """int64 [count] in host memory that every GPU reads and writes at the same address; freed by `close`."""

    def __init__(self, count: int) -> None:
        flags = runtime.cudaHostAllocPortable | runtime.cudaHostAllocMapped
        self.address = int(call(runtime.cudaHostAlloc, count * 8, flags))
        memory: Any = (ctypes.c_int64 * count).from_address(self.address)
        self.values: npt.NDArray[np.int64] = np.frombuffer(memory, dtype=np.int64)

    def close(self) -> None:
        call(runtime.cudaFreeHost, self.address)


def allocate(nbytes: int) -> int:
    """Memory on the current device."""
    return int(call(runtime.cudaMalloc, nbytes))


def free(address: int) -> None:
    call(runtime.cudaFree, address)


def new_stream() -> int:
    """A stream on the current device that waits for no other one; priority as low as can be: the model goes first."""
    least, _greatest = call(runtime.cudaDeviceGetStreamPriorityRange)
    return int(call(runtime.cudaStreamCreateWithPriority, runtime.cudaStreamNonBlocking, least))


def destroy_stream(stream: int) -> None:
    call(runtime.cudaStreamDestroy, stream)


def new_event() -> Any:
    return call(runtime.cudaEventCreateWithFlags, runtime.cudaEventDisableTiming)


def destroy_event(event: Any) -> None:
    call(runtime.cudaEventDestroy, event)


def record(event: Any, stream: int) -> None:
    """Set `event` behind all that `stream` was given so far."""
    call(runtime.cudaEventRecord, event, stream)


def wait_for(stream: int, event: Any) -> None:
    """What `stream` is given from now on waits for `event`."""
    call(runtime.cudaStreamWaitEvent, stream, event, 0)


_SUCCESS, _NOT_READY = runtime.cudaError_t.cudaSuccess, runtime.cudaError_t.cudaErrorNotReady


def is_done(event: Any) -> bool:
    """Whether all work before `event` is complete.

    Raises: TransportError if a kernel failed; every later call on this device fails then.
    """
    status = runtime.cudaEventQuery(event)[0]
    if status is _SUCCESS or status == _SUCCESS:
        return True
    if status == _NOT_READY:
        return False
    raise TransportError(f"work on the GPU failed: {status.name}; this process's CUDA context is broken, restart it")


def zero(address: int, nbytes: int, stream: int) -> None:
    """Start zeroing device memory."""
    call(runtime.cudaMemsetAsync, address, 0, nbytes, stream)


def download(target: int, source: int, nbytes: int, stream: int) -> None:
    """Start copying device memory to pinned host memory."""
    call(runtime.cudaMemcpyAsync, target, source, nbytes, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)


def upload(target: int, source: int, nbytes: int, stream: int) -> None:
    """Start copying pinned host memory to the device."""
    call(runtime.cudaMemcpyAsync, target, source, nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)
