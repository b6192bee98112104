"""The rival of `bench decode`: llama.cpp on the same weights as TQ2_0, 2.06 bits a weight, with its Q8_0 head.

Only `llama-cpp-python` and `gguf` know it; this file is loaded where they are installed.
Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import ctypes
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
from llama_cpp import llama_cpp as native  # pyright: ignore[reportMissingImports]

NAME = "llama.cpp TQ2_0"
QUIET = native.llama_log_callback(lambda level, text, data: None)


def write_gguf(file: Path, config: dict[str, Any], layers: list[dict[str, np.ndarray]], table: np.ndarray) -> None:
    """A Llama model: `layers` hold effective weights [O, I] in fp32 by the names of their linears; norms are ones."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    ones = np.ones(config["hidden_size"], dtype=np.float32)
    writer.add_tensor("output_norm.weight", ones)
    _add(writer, "token_embd.weight", table, gguf.GGMLQuantizationType.Q8_0)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    rows_of = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}
    for index, layer in enumerate(layers):
        for name, weight in layer.items():
            if name in rows_of:
                weight = _turned_in_neighbours(weight, rows_of[name])
            _add(writer, f"blk.{index}.{names[name]}.weight", weight, gguf.GGMLQuantizationType.TQ2_0)
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{index}.{norm}.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, weight: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


def _turned_in_neighbours(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows i and i + D / 2 of a head beside each other: llama.cpp's `llama` turns those pairs."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


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
