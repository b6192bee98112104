"""CUDA C++, compiled at run time by NVRTC and launched, both by `cuda.bindings`, which comes with torch on GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]
from torch import Tensor

CAPABILITY = (9, 0)  # of Hopper: wgmma and the bulk copies between its blocks are there and nowhere else
EMPTY = b'extern "C" __global__ void empty() {}'


def obstacle() -> str | None:
    """Why no kernel can run here; None where they can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    found = torch.cuda.get_device_capability()
    if found != CAPABILITY:
        has = ".".join(map(str, found))
        return f"it is written for compute capability 9.0 (H100, H200), and {torch.cuda.get_device_name()} has {has}"
    return None


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and the bytes of shared memory that it is launched with.

    waits        whether it waits by itself for the kernels before it, by griddepcontrol.wait ahead of all that it reads
                 and writes, except weights, which the kernel right before it must not have written, and ahead of
                 griddepcontrol.launch_dependents: then it may begin while the last one ends
    cooperative  whether its blocks wait for each other: then they begin at once, or the launch is refused
    """

    handle: Any
    shared_bytes: int
    waits: bool = False
    cooperative: bool = False

    def launch(self, blocks: int, threads: int, maps: Sequence[TensorMap], *arguments: int) -> None:
        """On torch's current device and stream; maps come first, then pointers and ints, which take 8 bytes each here.

        One call from Python costs as much as a small kernel, so this does what it must and no more.
        """
        values = (ctypes.c_int64 * len(arguments))(*arguments)
        here = ctypes.addressof(values)
        places = [one.address for one in maps] + [here + 8 * index for index in range(len(arguments))]
        pointers = (ctypes.c_int64 * len(places))(*places)
        attributes = []
        if self.waits:
            attributes.append(_attribute("PROGRAMMATIC_STREAM_SERIALIZATION", "programmaticStreamSerializationAllowed"))
        if self.cooperative:
            attributes.append(_attribute("COOPERATIVE", "cooperative"))
        config = _config(blocks, threads, self.shared_bytes, *attributes)
        config.hStream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        _check(driver.cuLaunchKernelEx(config, self.handle, ctypes.addressof(pointers), 0))


def _config(blocks: int, threads: int, shared_bytes: int, *attributes: Any) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = shared_bytes
    if attributes:
        config.attrs, config.numAttrs = list(attributes), len(attributes)
    return config


@lru_cache(maxsize=2)
def _attribute(name: str, field: str) -> Any:
    """One that is switched on: its name among the driver's CUlaunchAttributeID, its field of CUlaunchAttributeValue."""
    attribute = driver.CUlaunchAttribute()
    attribute.id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
    setattr(attribute.value, field, 1)
    return attribute


@dataclass(frozen=True)
class TensorMap:
    """How the copy engine finds boxes of a tensor: the descriptor, and where it lies on the host."""

    descriptor: Any
    address: int


@lru_cache(maxsize=256)
def compile_kernel(
    source: Path, name: str, shared_bytes: int = 0, waits: bool = False, cooperative: bool = False,
    **definitions: int | str,
) -> Kernel:  # fmt: skip
    """The kernel `name` of a file, with `definitions` for its preprocessor; RuntimeError with the compiler's words.

    The file may include the .cuh files that lie beside it.
    """
    headers = {file.name: file.read_bytes() for file in source.parent.glob("*.cuh")}
    binary = compile_source(source.read_bytes(), source.name, headers, **definitions)
    return Kernel(_load(binary, name, shared_bytes), shared_bytes, waits, cooperative)


def compile_source(text: bytes, file: str, headers: Mapping[str, bytes], **definitions: int | str) -> bytes:
    """Machine code; needs no GPU."""
    names = [name.encode() for name in headers]
    _, program = _check(nvrtc.nvrtcCreateProgram(text, file.encode(), len(names), list(headers.values()), names))
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{key}={value}" for key, value in definitions.items())]
    if nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0].value:
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program))[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{file} does not compile: {log.decode(errors='replace')}")
    binary = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program))[1])
    _check(nvrtc.nvrtcGetCUBIN(program, binary))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return bytes(binary)


def _load(binary: bytes, name: str, shared_bytes: int) -> Any:
    torch.cuda.init()  # and the driver with it
    _, library = _check(driver.cuLibraryLoadData(binary, [], [], 0, [], [], 0))
    _, kernel = _check(driver.cuLibraryGetKernel(library, name.encode()))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    for device in range(torch.cuda.device_count()):
        _check(driver.cuKernelSetAttribute(limit, shared_bytes, kernel, device))
    return driver.CUfunction(int(kernel))


def clusters_at_once(blocks: int, shared_bytes: int, device: int) -> int:
    """How many clusters of so many blocks, with so much shared memory each, run on a GPU at a time.

    A cluster lies within one of the groups that multiprocessors come in, and what is left over in each stays idle: so
    fewer fit than their blocks alone would.
    """
    kernel = _load(compile_source(EMPTY, "empty.cu", {}), "empty", shared_bytes)
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = attribute.value.clusterDim
    size.x, size.y, size.z = blocks, 1, 1
    _, context = _check(driver.cuDevicePrimaryCtxRetain(device))
    _check(driver.cuCtxPushCurrent(context))
    answer = driver.cuOccupancyMaxActiveClusters(kernel, _config(blocks, 32, shared_bytes, attribute))
    _check(driver.cuCtxPopCurrent())
    _check(driver.cuDevicePrimaryCtxRelease(device))
    return _check(answer)[1]


def tensor_map(tensor: Tensor, rows: int, columns: int, box_rows: int, box_bytes: int = 128) -> TensorMap:
    """Of a contiguous tensor as [rows, columns], in boxes that lie swizzled in shared memory."""
    return _tensor_map(tensor.data_ptr(), rows, columns, tensor.element_size(), box_rows, box_bytes)


@lru_cache(maxsize=65536)
def _tensor_map(address: int, rows: int, columns: int, item: int, box_rows: int, box_bytes: int) -> TensorMap:
    kinds = driver.CUtensorMapDataType
    kind = {1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16}[item]
    size, count = driver.cuuint64_t, driver.cuuint32_t
    _, descriptor = _check(
        driver.cuTensorMapEncodeTiled(
            kind, 2, address, [size(columns), size(rows)], [size(columns * item)],
            [count(box_bytes // item), count(box_rows)], [count(1), count(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )  # fmt: skip
    return TensorMap(descriptor, int(descriptor.getPtr()))


def _check(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    if answer[0].value:
        raise RuntimeError(f"CUDA: {answer[0].name}")
    return answer
