"""`bench decode`: a whole packed model that reads a prompt and writes, beside the reading of its bytes.

Shapes: O out_features, I in_features, H hidden_size, V vocabulary.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparse_bitnet import _native
from sparse_bitnet.bench.checks import check_packed_linear
from sparse_bitnet.bench.linear import PATTERNS, random_codes
from sparse_bitnet.checkpoint.directory import CONFIG, WEIGHTS, write_text
from sparse_bitnet.engine.decoder import Decoder
from sparse_bitnet.formats import get_format
from sparse_bitnet.kernels.packed_linear import PackedLayout
from sparse_bitnet.kernels.packed_linear.cpu_native import instruction_set
from sparse_bitnet.nn.stored_settings import StoredSettings
from sparse_bitnet.recipe import Recipe

EMBEDDING, LAYER = "model.embed_tokens.weight", "model.layers.{}"
PAUSE = 0.3  # seconds between systems, in which the threads of the one before go to sleep
LEAST_LIKENESS = 0.99  # of logits, or the two have not computed the same model
PEAK_MEMORY = """
import json, sys
from sparse_bitnet.bench.decode import peak_bytes
from sparse_bitnet.engine.decoder import Decoder
before = peak_bytes()
decoder = Decoder(sys.argv[1], threads=int(sys.argv[2]))
prompt, new_tokens = int(sys.argv[3]), int(sys.argv[4])
written = sum(1 for _ in decoder.generate([[1] * prompt], new_tokens))
cache = decoder.cache_bytes(prompt + new_tokens)
print(json.dumps({"libraries_bytes": before, "peak_bytes": peak_bytes(), "cache_bytes": cache, "written": written}))
"""


@dataclass(frozen=True)
class DecodeBench:
    """A Llama model with random ternary weights, tied embeddings and bf16 for what is not ternary."""

    hidden: int = 1536
    ffn: int = 4096
    layers: int = 24
    heads: int = 12
    kv_heads: int = 2
    head: int = 128
    vocabulary: int = 32_000
    formats: tuple[str, ...] = ("i2", "g4s3")
    threads: tuple[int, ...] = (1, 2)
    prompt: int = 512
    new_tokens: int = 64
    rounds: int = 5
    compare: bool = False
    seed: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """[O, I] of the linears of a layer."""
        hidden, ffn, query, kv = self.hidden, self.ffn, self.heads * self.head, self.kv_heads * self.head
        return {
            "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        """The fields of config.json but for the quantisation."""
        return {
            "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.ffn, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head,
            "vocab_size": self.vocabulary, "max_position_embeddings": self.prompt + self.new_tokens + 1,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        }  # fmt: skip


def bench_decode(bench: DecodeBench) -> dict[str, Any]:
    """Rows of speeds by format and threads, all in turn in each round; ValueError where a kernel is wrong.

    With `compare` the first format's weights are llama.cpp's too, and ratios are to it; ImportError without it.
    """
    result: dict[str, Any] = {"instruction_set": instruction_set(), "bench": vars(bench)}
    with tempfile.TemporaryDirectory() as directory:
        models = {format: write_model(bench, format, Path(directory) / format) for format in bench.formats}
        rival = None
        if bench.compare:
            rival = Path(directory) / "rival.gguf"
            result |= _write_rival(bench, models[bench.formats[0]], rival)
        result["decode"] = [row for threads in bench.threads for row in _rows(bench, models, rival, threads)]
        result["memory"] = [_memory(bench, format, path) for format, path in models.items()]
    return result


def write_model(bench: DecodeBench, format: str, directory: Path) -> Path:
    """A packed checkpoint; the layers hold the same codes, each in bytes of its own."""
    torch.manual_seed(bench.seed)
    directory.mkdir()
    pattern = PATTERNS.get(format)
    recipe = Recipe(pattern, values="sign") if pattern else Recipe("6:8")
    settings = StoredSettings(recipe, format, ("lm_head",))
    table = torch.randn(bench.vocabulary, bench.hidden).bfloat16()
    tensors: dict[str, Tensor] = {EMBEDDING: table, "model.norm.weight": _ones(bench.hidden)}
    for name, (rows, width) in bench.shapes.items():
        packed = get_format(format).pack(random_codes(format, rows, width))
        check_packed_linear(packed, PackedLayout(format, width, "int8"), (1, 33))
        for layer in range(bench.layers):
            tensors[f"{LAYER.format(layer)}.{name}.weight"] = packed.clone()
            tensors[f"{LAYER.format(layer)}.{name}.weight_scale"] = _scale(width)
    for layer in range(bench.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{LAYER.format(layer)}.{norm}.weight"] = _ones(bench.hidden)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = {**bench.config, "quantization_config": settings.to_dict()}
    write_text(directory / CONFIG, json.dumps(config))
    return directory


def peak_bytes() -> int | None:
    """The most memory that this process has had; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _scale(width: int) -> Tensor:
    """[1] fp32 that fp16 holds; it keeps the size of what passes a linear."""
    return torch.tensor([width**-0.5]).half().float()


def _ones(width: int) -> Tensor:
    return torch.ones(width, dtype=torch.bfloat16)


def _write_rival(bench: DecodeBench, model: Path, file: Path) -> dict[str, Any]:
    """The weights of `model` for llama.cpp, and how near its logits are to ours: 1 would be equal.

    It quantises activations in blocks of 256, and its head's too, so that they are not.
    """
    from sparse_bitnet.bench import llama_cpp
    from sparse_bitnet.interop.gguf import export_gguf

    export_gguf(str(model), file, "tq2_0", embedding="q8_0")
    prompt = _prompt(bench)[:16]
    rival = llama_cpp.LlamaCpp(file, bench.config["max_position_embeddings"], bench.prompt, 1)
    both = torch.stack([torch.from_numpy(rival.logits(prompt).copy()), Decoder(model, threads=1).logits(prompt)[-1]])
    rival.close()
    likeness = float(torch.corrcoef(both)[0, 1])
    if not likeness > LEAST_LIKENESS:
        raise ValueError(f"llama.cpp computes another model: its logits correlate with ours by {likeness:.3f}")
    return {"rival": {"correlation_of_logits": likeness, "bytes": file.stat().st_size, **llama_cpp.system()}}


def _rows(bench: DecodeBench, models: dict[str, Path], rival: Path | None, threads: int) -> list[dict[str, Any]]:
    seconds: dict[tuple[str, str], list[float]] = {}
    prompt = _prompt(bench)
    decoders = {format: Decoder(path, threads=threads) for format, path in models.items()}
    rounds: dict[str, Callable[[], dict[str, float]]] = {
        format: partial(_round, decoder, prompt, bench.new_tokens) for format, decoder in decoders.items()
    }
    if rival is not None:
        from sparse_bitnet.bench.llama_cpp import NAME, LlamaCpp

        other = LlamaCpp(rival, bench.config["max_position_embeddings"], bench.prompt, threads)
        rounds = {NAME: partial(_rival_round, other, prompt, bench.new_tokens), **rounds}
    for _ in range(bench.rounds):
        for system, run in rounds.items():
            time.sleep(PAUSE)
            for what, took in run().items():
                seconds.setdefault((system, what), []).append(took)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    rows = []
    for system in rounds:
        token, prefill = median[system, "token"], median[system, "prefill"]
        row = {
            "system": system, "threads": threads, "tokens_per_second": 1 / token, "ms": 1e3 * token,
            "ms_of_rounds": [1e3 * one for one in seconds[system, "token"]],
            "prefill_tokens_per_second": bench.prompt / prefill,
            "prefill_ms_of_rounds": [1e3 * one for one in seconds[system, "prefill"]],
            "times_first": median[bench.formats[0], "token"] / token,
        }  # fmt: skip
        if rival is not None:
            first = next(iter(rounds))
            row["times_rival"] = median[first, "token"] / token
            row["prefill_times_rival"] = median[first, "prefill"] / prefill
        if system in decoders:
            read = median[system, "read"]
            size = sum(matrix.nbytes for matrix in decoders[system].matrices)
            row |= {"bits": get_format(system).bits, "bytes": size}
            row |= {"roof_ms": 1e3 * read, "share_of_roof": read / token}
        rows.append(row)
    return rows


def _round(decoder: Decoder, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """Seconds of a prompt, of a token after the first, and of reading what a token reads."""

    def read() -> None:
        for matrix in decoder.matrices:
            _native.read_bytes(matrix.data_ptr(), matrix.nbytes, decoder.threads)

    prefill = _seconds(lambda: next(decoder.generate([prompt], 1)))
    writing = decoder.generate([prompt[:1]], new_tokens + 1)
    next(writing)
    token = _seconds(lambda: list(writing)) / new_tokens
    return {"prefill": prefill, "token": token, "read": _seconds(read)}


def _rival_round(rival: Any, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """The same of llama.cpp."""

    def write() -> None:
        token = int(first.argmax())
        for _ in range(new_tokens):
            token = int(rival.logits([token]).argmax())

    rival.forget()
    prefill = _seconds(lambda: rival.logits(prompt).argmax())
    rival.forget()
    first = rival.logits(prompt[:1])
    return {"prefill": prefill, "token": _seconds(write) / new_tokens}


def _prompt(bench: DecodeBench) -> list[int]:
    return torch.randint(bench.vocabulary, (bench.prompt,), generator=torch.Generator().manual_seed(1)).tolist()


def _memory(bench: DecodeBench, format: str, directory: Path) -> dict[str, Any]:
    """The most memory of a process of its own that reads the prompt and writes, beside what it must hold."""
    arguments = [str(directory), str(max(bench.threads)), str(bench.prompt), str(bench.new_tokens)]
    answer = subprocess.run([sys.executable, "-c", PEAK_MEMORY, *arguments], capture_output=True, text=True, check=True)
    seen = json.loads(answer.stdout)
    weights = (directory / WEIGHTS).stat().st_size
    if seen["peak_bytes"] is not None:
        seen["beyond_bytes"] = seen["peak_bytes"] - seen["libraries_bytes"] - weights - seen["cache_bytes"]
    return {"format": format, "weights_bytes": weights, **seen}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
