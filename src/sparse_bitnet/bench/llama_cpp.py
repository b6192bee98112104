"""The rival of `bench decode`: llama.cpp, by way of `llama-cpp-python`; loaded where that is installed."""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path

import numpy as np
from llama_cpp import llama_cpp as native  # pyright: ignore[reportMissingImports]

NAME = "llama.cpp TQ2_0"  # 2.06 bits a weight, with its Q8_0 head
QUIET = native.llama_log_callback(lambda level, text, data: None)


class LlamaCpp:
    """A GGUF file opened by llama.cpp, with `threads` threads for prompts and for tokens."""

    def __init__(self, file: Path, context: int, batch: int, threads: int) -> None:
        native.llama_log_set(QUIET, ctypes.c_void_p(0))
        native.llama_backend_init()
        self.model = native.llama_model_load_from_file(str(file).encode(), native.llama_model_default_params())
        settings = native.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, batch, batch
        settings.n_threads = settings.n_threads_batch = threads
        self.context = native.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"{file}: llama.cpp cannot open it")
        self.vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(self.model))

    def forget(self) -> None:
        native.llama_memory_clear(native.llama_get_memory(self.context), True)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Of the last of these tokens, which follow what was given before."""
        array = (native.llama_token * len(tokens))(*tokens)
        if native.llama_decode(self.context, native.llama_batch_get_one(array, len(tokens))) != 0:
            raise ValueError("llama.cpp could not decode")
        return np.ctypeslib.as_array(native.llama_get_logits_ith(self.context, -1), shape=(self.vocabulary,))

    def close(self) -> None:
        native.llama_free(self.context)
        native.llama_model_free(self.model)


def system() -> dict[str, str]:
    """The version, and what llama.cpp says of the instruction sets that it was built for."""
    return {"llama-cpp-python": version("llama-cpp-python"), "built_for": native.llama_print_system_info().decode()}
