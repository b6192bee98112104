"""`sparse-bitnet doctor`"""

from __future__ import annotations

from sparse_bitnet.cli.options import JsonFile, write_json

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "pydantic", "typer",
)  # fmt: skip


def doctor(json: JsonFile = None) -> None:
    """Tell what is installed, what hardware there is, and which kernels can run here, with the reason where not."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import sparse_bitnet
    from sparse_bitnet.kernels import OPERATORS

    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    report = {
        "sparse-bitnet": sparse_bitnet.__version__,
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": ", ".join(gpus) or "none that torch can use",
    }
    kernels = {
        f"{operator.name}/{backend.name}": operator.obstacle(backend) or "works"
        for operator in OPERATORS
        for backend in operator.backends
    }
    write_json(json, {"environment": report, "kernels": kernels})
    for title, rows in (("environment", report), ("kernels", kernels)):
        print(title)
        for name, value in rows.items():
            print(f"  {name:<32} {value}")
