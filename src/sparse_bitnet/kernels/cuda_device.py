"""CUDA C++, compiled at run time by NVRTC and launched, both by `cuda.bindings`, which comes with torch on GPUs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cuda.bindings import driver, nvrtc  # pyright: ignore[reportMissingImports]
from torch import Tensor

CAPABILITY = (9, 0)  # of Hopper: wgmma and the bulk copies between its blocks are there and nowhere else


def obstacle() -> str | None:
    """Why no kernel can run here; None where they can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    found = torch.cuda.get_device_capability()
    if found != CAPABILITY:
        return f"it is written for compute capability 9.0 (H100, H200), and {torch.cuda.get_device_name()} has " + (
            ".".join(map(str, found))
        )
    return None


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel and the bytes of shared memory that it is launched with."""

    handle: Any
    shared_bytes: int

    def launch(self, blocks: int, threads: int, *arguments: Any) -> None:
        """On torch's current device and stream. Arguments: tensors, None for a null pointer, ints, tensor maps."""
        held = [_as_argument(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(pointer for pointer, _ in held))
        stream = torch.cuda.current_stream().cuda_stream
        _check(
            driver.cuLaunchKernel(
                self.handle, blocks, 1, 1, threads, 1, 1, self.shared_bytes, stream, ctypes.addressof(pointers), 0
            )
        )


@lru_cache(maxsize=64)
def compile_kernel(source: Path, name: str, shared_bytes: int = 0, **definitions: int | str) -> Kernel:
    """The kernel `name` of a file, with `definitions` for its preprocessor; RuntimeError with the compiler's words."""
    torch.cuda.init()  # there is a context now
    _, program = _check(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], []))
    options = ["--gpu-architecture=sm_90a", "--std=c++17", *(f"-D{key}={value}" for key, value in definitions.items())]
    if nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])[0].value:
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program))[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{source.name} does not compile: {log.decode(errors='replace')}")
    binary = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program))[1])
    _check(nvrtc.nvrtcGetCUBIN(program, binary))
    _check(nvrtc.nvrtcDestroyProgram(program))
    _, library = _check(driver.cuLibraryLoadData(bytes(binary), [], [], 0, [], [], 0))
    _, kernel = _check(driver.cuLibraryGetKernel(library, name.encode()))
    limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    for device in range(torch.cuda.device_count()):
        _check(driver.cuKernelSetAttribute(limit, shared_bytes, kernel, device))
    return Kernel(driver.CUfunction(int(kernel)), shared_bytes)


def tensor_map(tensor: Tensor, box_rows: int, box_bytes: int = 128) -> Any:
    """How the copy engine finds the rows of a contiguous tensor [R, C], in boxes that lie swizzled in shared memory."""
    rows, columns = tensor.shape
    return _tensor_map(tensor.data_ptr(), rows, columns, tensor.element_size(), box_rows, box_bytes)


@lru_cache(maxsize=65536)
def _tensor_map(address: int, rows: int, columns: int, item: int, box_rows: int, box_bytes: int) -> Any:
    kinds = driver.CUtensorMapDataType
    kind = {1: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8, 2: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT16}[item]
    size, count = driver.cuuint64_t, driver.cuuint32_t
    return _check(
        driver.cuTensorMapEncodeTiled(
            kind, 2, address, [size(columns), size(rows)], [size(columns * item)],
            [count(box_bytes // item), count(box_rows)], [count(1), count(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )[1]  # fmt: skip


def _as_argument(argument: Any) -> tuple[int, Any]:
    """Where the argument's value lies, and what keeps it there."""
    if isinstance(argument, driver.CUtensorMap):
        return int(argument.getPtr()), argument
    if isinstance(argument, int):
        value: Any = ctypes.c_int(argument)
    else:
        value = ctypes.c_void_p(0 if argument is None else argument.data_ptr())
    return ctypes.addressof(value), value


def _check(answer: tuple[Any, ...]) -> tuple[Any, ...]:
    if answer[0].value:
        raise RuntimeError(f"CUDA: {answer[0].name}")
    return answer
