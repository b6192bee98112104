"""`sparse-bitnet doctor`"""

from __future__ import annotations

from sparse_bitnet.cli.options import JsonFile, write_json


def doctor(json: JsonFile = None) -> None:
    """Tell what is installed, what hardware there is, and which kernels can run here, with the reason where not."""
    from sparse_bitnet.checkpoint.provenance import provenance
    from sparse_bitnet.kernels import OPERATORS, packed_linear

    found = provenance()
    report = {
        "python": found["python"],
        **{package: installed or "not installed" for package, installed in found["versions"].items()},
        "system": found["system"],
        "cpu": f"{found['cpu']}, {found['cpu_capability']}, {found['threads']} threads",
        "gpu": ", ".join(found["gpus"]) or "none that torch can use",
    }
    obstacle = packed_linear.OPERATOR.obstacle(packed_linear.NATIVE)
    if obstacle is None:
        from sparse_bitnet.kernels.packed_linear.cpu_native import instruction_set, instruction_sets

        report["native"] = f"{instruction_set()}, of {', '.join(instruction_sets())}"
    else:
        report["native"] = f"not built: {packed_linear.NATIVE.remedy}"
    kernels = {
        f"{operator.name}/{backend.name}": operator.obstacle(backend) or "works"
        for operator in OPERATORS
        for backend in operator.backends
    }
    width = max(map(len, [*report, *kernels]))
    for title, rows in (("environment", report), ("kernels", kernels)):
        print(title)
        for name, value in rows.items():
            print(f"  {name:<{width}} {value}")
    write_json(json, {"environment": report, "kernels": kernels})
