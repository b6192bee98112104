"""The decoder step of a GPU on a CPU: its source, compiled by the host's compiler with what stands in for CUDA here."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from sparse_bitnet.kernels.decoder_step import Decoder, Step
from sparse_bitnet.kernels.decoder_step.plan import Plan, definitions, layer_words, make_room

HERE = Path(__file__).parent
KERNEL = Path(__file__).parents[3] / "src" / "sparse_bitnet" / "kernels" / "decoder_step"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def emulated_step(decoder: Decoder, blocks: int, seed: int = 0) -> Step:
    """What gpu_cuda gives, in room that is poisoned before."""
    plan = Plan.of(decoder, blocks)
    assert plan.slots and plan.splits
    given = {**definitions(decoder, plan), "SHARED_BYTES": plan.shared_bytes}
    library = _compiled(tuple(f"-D{name}={value}" for name, value in given.items()))
    table = torch.tensor(layer_words(decoder), dtype=torch.int64)
    room = make_room(decoder, plan)  # its counters reset themselves

    def step(x: Tensor, position: Tensor) -> None:
        for one in room[:-1]:
            one.view(torch.uint8).fill_(0xFF)  # no number
        pointers = [table, x, *room, position, decoder.cosines, decoder.sines]
        places = decoder.layers[0].keys.shape[1]
        library.launch(
            *(ctypes.c_void_p(one.data_ptr()) for one in pointers), len(decoder.layers), places, ctypes.c_int(seed)
        )

    return step


@cache
def _compiled(given: tuple[str, ...]) -> ctypes.CDLL:
    with TemporaryDirectory() as directory:
        for file in (*KERNEL.glob("*.cu*"), *HERE.glob("*.*p*"), HERE / "ptx.cuh"):  # ours over the kernel's
            shutil.copy(file, directory)
        out = Path(directory) / "decoder_step.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-w"]
        command = [str(COMPILER), *flags, *given, str(Path(directory) / "decoder_step.cpp"), "-o", str(out)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stderr
        return ctypes.CDLL(str(out))
