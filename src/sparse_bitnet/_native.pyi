"""The C++ extension of `csrc/module.cpp`."""

def instruction_sets() -> list[str]: ...
def packed_linear(
    instruction_set: int,
    x: int,
    dtype: int,
    tokens: int,
    in_features: int,
    int4: bool,
    weight: int,
    rows: int,
    row_bytes: int,
    format: int,
    scale: int,
    row_scale: int,
    bias: int,
    bias_dtype: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def read_bytes(address: int, bytes: int, threads: int, /) -> int: ...
