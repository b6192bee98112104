"""CUDA C++ without a GPU: it compiles for Hopper with all definitions that it is given, and products stay in flight."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.test_decoder_step import Shape, random_decoder
from sparse_bitnet.kernels.decoder_step.plan import Plan, definitions
from sparse_bitnet.kernels.sparse_product.tiling import TILINGS, Tiling

KERNELS = Path(__file__).parents[2] / "src" / "sparse_bitnet" / "kernels"
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def compiled(source: Path, directory: Path, **definitions: str) -> str:
    """What the compiler has to say."""
    command = [
        str(NVCC), "-cubin", "-o", str(directory / "kernel.cubin"), "-gencode=arch=compute_90a,code=sm_90a",
        "-std=c++17", "-Xptxas", "-v", *(f"-D{name}={value}" for name, value in definitions.items()), str(source),
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "warning" not in answer.stderr
    return answer.stderr


@pytest.mark.parametrize(("result", "per_row", "adds"), [("bf16", "0", "0"), ("bf16", "1", "1"), ("f16", "0", "1")])
@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_the_sparse_product_compiles_and_is_not_serialised(
    tiling: Tiling, result: str, per_row: str, adds: str, tmp_path: Path
) -> None:
    source = KERNELS / "sparse_product" / "gpu_sparse_tensor_core.cu"
    definitions = {name: str(value) for name, value in tiling.definitions.items()}
    told = compiled(source, tmp_path, RESULT=f'"{result}"', PER_ROW=per_row, ADDS=adds, **definitions)
    assert "Compiling entry function 'sparse_product'" in told
    assert "serialized" not in told
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert spilled is not None
    assert int(spilled[1]) <= (0 if tiling.splits == 1 else 16)


@pytest.mark.parametrize(("m", "source"), [("4", "short"), ("6", "signed char"), ("8", "int"), ("32", "short")])
def test_the_packing_compiles_for_every_group_and_dtype(m: str, source: str, tmp_path: Path) -> None:
    file = KERNELS / "weight_fragments" / "gpu_cuda.cu"
    told = compiled(file, tmp_path, M=m, SOURCE=source, IS_FLOAT=str(int(source != "signed char")))
    assert "0 bytes spill stores" in told


@pytest.mark.parametrize("first", ["nothing", "gate", "norm"])
@pytest.mark.parametrize(("m", "kind"), [("4", "1"), ("6", "0"), ("8", "2"), ("32", "1")])
def test_the_quantisation_compiles_for_every_group_and_dtype(m: str, kind: str, first: str, tmp_path: Path) -> None:
    file = KERNELS / "quantize_lifted" / "gpu_cuda.cu"
    told = compiled(
        file, tmp_path, M=m, KIND=kind, GATED=str(int(first == "gate")), NORMED=str(int(first == "norm")), PLANES="0",
        THREADS="512", HELD="8", SMALLEST="1e-05f", EPSILON="1e-06f",
    )  # fmt: skip
    assert "0 bytes spill stores" in told


@pytest.mark.parametrize("kind", ["1", "2"])
@pytest.mark.parametrize("m", ["4", "8"])
def test_gates_of_few_groups_fill_a_multiprocessor_without_spilling(m: str, kind: str, tmp_path: Path) -> None:
    told = compiled(
        KERNELS / "quantize_lifted" / "gpu_cuda.cu", tmp_path, M=m, KIND=kind, GATED="1", NORMED="0", PLANES="0",
        THREADS="512", HELD="3", SMALLEST="1e-05f", EPSILON="0.0f",
    )  # fmt: skip
    assert "0 bytes spill stores" in told
    registers = re.search(r"Used (\d+) registers", told)
    assert registers is not None and int(registers[1]) <= 65536 // 2048


@pytest.mark.parametrize("kind", ["0", "1", "2"])
def test_the_quantisation_to_planes_compiles_for_every_dtype(kind: str, tmp_path: Path) -> None:
    told = compiled(
        KERNELS / "quantize_lifted" / "gpu_cuda.cu", tmp_path, M="4", KIND=kind, GATED="1", NORMED="0", PLANES="1",
        THREADS="512", HELD="8", SMALLEST="1e-05f", EPSILON="0.0f",
    )  # fmt: skip
    assert "0 bytes spill stores" in told


@pytest.mark.parametrize(("m", "result"), [("4", "bf16"), ("6", "f16"), ("8", "bf16"), ("32", "bf16")])
def test_the_unpacking_compiles_for_every_group_and_dtype(m: str, result: str, tmp_path: Path) -> None:
    file = KERNELS / "dequantize_fragments" / "gpu_cuda.cu"
    assert "0 bytes spill stores" in compiled(file, tmp_path, M=m, RESULT=f'"{result}"')


@pytest.mark.parametrize(
    "shape",
    [
        Shape(896, 4864, 14, 2, 64),
        Shape(2048, 11008, 16, 2, 128),
        Shape(4096, 14336, 32, 8, 128),
        Shape(8192, 28672, 64, 8, 128),
        Shape(192, 320, 15, 3, 256),
    ],
    ids=lambda shape: str(shape.hidden),
)
def test_the_decoder_step_compiles_for_models_of_every_size(shape: Shape, tmp_path: Path) -> None:
    decoder = random_decoder(replace(shape, layers=1), "meta")
    decoder = replace(decoder, layers=36 * decoder.layers)
    plan = Plan.of(decoder, blocks=132)
    assert plan.slots >= 2
    told = compiled(
        KERNELS / "decoder_step" / "gpu_cuda.cu",
        tmp_path,
        **{name: str(value) for name, value in definitions(decoder, plan).items()},
    )
    spilled = re.search(r"(\d+) bytes spill stores", told)
    assert spilled is not None and int(spilled[1]) <= 384
