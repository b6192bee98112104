"""The Triton kernels without a GPU: the tests of these files, by Triton's interpreter, in processes side by side."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

FILES = [Path(__file__).with_name(name) for name in ("test_gpu_triton.py", "test_packed_linear_on_gpu.py")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests run on the GPU")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for file in FILES
    ]  # fmt: skip
    for run, (output, _) in [(run, run.communicate()) for run in runs]:
        assert run.returncode == 0, output
        assert " passed" in output
