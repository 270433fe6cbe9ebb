"""GPUs of NVIDIA: whether this machine's runs the kernels of a library, and what it is asked to do.

The driver is asked through its own library, libcuda; nothing of CUDA needs to be installed for that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import ContractError, TargetError

CUDA = 2  # DLPack's device type
# Modules of their own: machine code for one of these runs on no other GPU, nor that of others on them. Sources: NVIDIA,
# CUDA C++ Programming Guide, "Binary Compatibility"; CUDA GPU Compute Capability, section Jetson.
_JETSON = frozenset({53, 62, 72, 87, 101, 110})
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*. Source: cuda.h
_NON_BLOCKING, _RELAXED = 1, 2  # cudaStreamNonBlocking, cudaStreamCaptureModeRelaxed. Source: driver_types.h
_DRIVER, _RUNTIME = "libcuda.so.1", "libcudart.so.13"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """Say which GPUs run kernels: 87 is compute capability 8.7, sm_87."""

    compiled: tuple[int, ...]  # there is machine code for these
    readable: int  # assembly text that a driver compiles for this and newer ones; 0: none


@cache
def capability_here() -> int | None:
    """Return the compute capability of the first GPU, 87 for 8.7; None where the driver shows none."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    found = [ctypes.c_int(), ctypes.c_int()]
    if driver.cuInit(0):
        return None
    for number, attribute in zip(found, (_MAJOR, _MINOR), strict=True):
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, 0):
            return None
    return 10 * found[0].value + found[1].value


def reads(gpu: GpuFacts, capability: int) -> bool:
    """Say whether a GPU of a compute capability runs kernels."""
    same = [n for n in gpu.compiled if n // 10 == capability // 10 and n <= capability and n not in _JETSON]
    compiled = capability in gpu.compiled or (capability not in _JETSON and bool(same))
    return compiled or 0 < gpu.readable <= capability


def why_not(gpu: GpuFacts) -> str:
    """Say what keeps this machine from running kernels; empty where nothing does."""
    capability = capability_here()
    if capability is None:
        return "this machine shows no GPU of NVIDIA"
    return "" if reads(gpu, capability) else f"this machine's GPU is sm_{capability}"


def check_gpu(gpu: GpuFacts) -> None:
    """Raise TargetError unless this machine's GPU runs the kernels of a library."""
    if reason := why_not(gpu):
        wanted = ", ".join(f"sm_{number}" for number in gpu.compiled)
        raise TargetError(f"the bundle's kernels are for NVIDIA's {wanted}, but {reason}: build a bundle for it")


def open_cuda_runtime() -> None:
    """Open CUDA's runtime for TVM's, from its package where that is installed; else the loader looks for it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for file in sorted(Path(folder).glob(f"cu*/lib/{_RUNTIME}")):
            ctypes.CDLL(os.fspath(file), ctypes.RTLD_GLOBAL)


class Memory:
    """Carry arrays into tensors on a device of TVM's and back."""

    def __init__(self, ffi: Any, device: Any) -> None:
        self._device = device
        self._dtype = ffi.dtype
        names = ("TVMTensorAllocWithScope", "TVMTensorCopyFromBytes", "TVMTensorCopyToBytes")
        self._new, self._write, self._read = (ffi.get_global_func(f"runtime.{name}") for name in names)

    def put(self, array: np.ndarray) -> Any:
        """Return a copy of an array on the device."""
        tensor = self._new(array.shape, self._dtype(array.dtype.name), self._device, None)
        self.write(tensor, array)
        return tensor

    def write(self, tensor: Any, array: np.ndarray) -> None:
        """Write an array into a tensor of its shape and dtype."""
        array = np.ascontiguousarray(array)
        if array.nbytes:
            self._write(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)

    def take(self, tensor: Any) -> np.ndarray:
        """Return a copy of a tensor here."""
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        if array.nbytes:
            self._read(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array


class Device(Memory):
    """Order what runs on the first GPU, and record calls so that one request launches all their kernels again.

    Kernels wait in a stream of their own, since those of CUDA's default one can't be recorded. Copies wait for nothing
    but each other, so what is read back waits for the stream first.
    """

    def __init__(self, ffi: Any) -> None:
        device = ffi.device("cuda", 0)
        super().__init__(ffi, device)
        self._runtime = ctypes.CDLL(_RUNTIME)
        self._stream = ctypes.c_void_p()
        if self._ask("cudaStreamCreateWithFlags", ctypes.byref(self._stream), _NON_BLOCKING):
            raise TargetError("CUDA gives no stream on this machine's GPU: close what else runs there, or restart it")
        self.ordered = partial(ffi.use_raw_stream, device, self._stream.value or 0)

    def take(self, tensor: Any) -> np.ndarray:
        """Return a copy of a tensor here; what was asked of the device is done by then."""
        self._ask("cudaStreamSynchronize", self._stream)
        return super().take(tensor)

    def record(self, call: Callable[[], Any]) -> Recording | None:
        """Make a call whose kernels are kept in place of being run; None where CUDA doesn't let it.

        The call allocates nothing new: one like it went before. Memory that it gave back belongs to the next call, and
        to the recording while that runs.
        """
        graph, program = ctypes.c_void_p(), ctypes.c_void_p()
        if self._ask("cudaStreamBeginCapture", self._stream, _RELAXED):
            return None
        try:
            result = call()
        finally:
            failed = self._ask("cudaStreamEndCapture", self._stream, ctypes.byref(graph))
        if failed or self._ask("cudaGraphInstantiate", ctypes.byref(program), graph, ctypes.c_ulonglong(0)):
            return None
        self._ask("cudaGraphDestroy", graph)
        return Recording(result, partial(self._ask, "cudaGraphLaunch", program, self._stream), self._forget(program))

    def _forget(self, program: ctypes.c_void_p) -> Callable[[], Any]:
        return partial(self._ask, "cudaGraphExecDestroy", program)

    def _ask(self, name: str, *arguments: Any) -> int:
        """Call CUDA's runtime; 0 is success."""
        return int(getattr(self._runtime, name)(*arguments))


class Recording:
    """Hold the kernels of one call, and what it returned, which every launch writes again."""

    def __init__(self, result: Any, launch: Callable[[], int], forget: Callable[[], Any]) -> None:
        self.result = result
        self._launch = launch
        weakref.finalize(self, forget)

    def launch(self) -> None:
        """Run the kernels; ContractError where CUDA refuses."""
        if status := self._launch():
            raise ContractError(f"CUDA refused to run a recorded call with error {status}: load the bundle again")
