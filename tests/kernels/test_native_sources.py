"""The native kernels without Python: under sanitizers, and, built for another processor, under an emulator.

The programs are `csrc/test_driver.cpp`, which compares every kernel with plain loops, and `csrc/test_decoder.cpp`.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAMS = ("test_driver", "test_decoder")


def tool(name: str) -> str:
    """Its path: beside this Python, where pip puts cmake and ninja, or on PATH; skips where it is not installed."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def build(directory: Path, *definitions: str) -> Path:
    generate = [
        tool("cmake"), "-S", str(CSRC), "-B", str(directory), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        "-DSPARSE_BITNET_TEST_DRIVER=ON", *definitions,
    ]  # fmt: skip
    for command in (generate, [tool("cmake"), "--build", str(directory)]):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr
    return directory


def instruction_sets_of(command: list[str]) -> list[str]:
    """Those that the program found right; fails with what it says where one is wrong."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return [line.partition(":")[0] for line in answer.stdout.splitlines() if line.endswith(" equal")]


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizers: str, tmp_path: Path) -> None:
    tool("c++")
    programs = build(tmp_path, f"-DSPARSE_BITNET_SANITIZE={sanitizers}")
    for program in PROGRAMS:
        assert instruction_sets_of([str(programs / program)])[-1] == "scalar"


def test_neon_is_right_under_an_emulator(tmp_path: Path) -> None:
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("this machine runs NEON itself: test_cpu_native.py")
    compiler, emulator = tool("aarch64-linux-gnu-g++"), tool("qemu-aarch64")
    programs = build(
        tmp_path, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )  # fmt: skip
    for program in PROGRAMS:
        path = str(programs / program)
        assert instruction_sets_of([emulator, "-cpu", "max", path]) == ["neon", "scalar"]
        older = instruction_sets_of([emulator, "-cpu", "cortex-a53", path])  # ARMv8.0, without the dot product
        assert older == ["scalar"]
