"""The C++ extension of `csrc/module.cpp`."""

def instruction_sets() -> list[str]: ...
def packed_linear(*arguments: int) -> None: ...  # the 15 of `cpu_native.native_arguments`, and threads
def read_bytes(address: int, bytes: int, threads: int, /) -> int: ...

class Model:
    def __init__(
        self,
        vocabulary: int,
        hidden: int,
        ffn: int,
        heads: int,
        kv_heads: int,
        head: int,
        epsilon: float,
        int4: bool,
        frequencies: list[float],
        rotary_scale: float,
        embedding: int,
        embedding_dtype: int,
        final_norm: int,
        /,
    ) -> None: ...
    def add_layer(
        self,
        projections: list[tuple[int, int, int, int, int, int, int]],
        attention_norm: int,
        mlp_norm: int,
        query_norm: int,
        key_norm: int,
        /,
    ) -> None: ...
    def set_head(self, rows: int, scales: int, dtype: int, stride: int, /) -> None: ...

class Cache:
    def __init__(self, model: Model, capacity: int, /) -> None: ...
    @property
    def length(self) -> int: ...
    @property
    def bytes(self) -> int: ...

def forward(
    model: Model,
    caches: list[Cache],
    tokens: list[list[int]],
    every: bool,
    logits: int,
    instruction_set: int,
    threads: int,
    /,
) -> None: ...
def quantize_head(
    rows: int,
    dtype: int,
    count: int,
    width: int,
    stride: int,
    codes: int,
    scales: int,
    instruction_set: int,
    threads: int,
    /,
) -> None: ...
def sample(
    logits: int,
    vocabulary: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seen: list[int],
    uniform: float,
    /,
) -> int: ...
