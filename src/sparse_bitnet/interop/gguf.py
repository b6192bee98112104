"""A packed model as a GGUF file, which stock llama.cpp and what is built on it read; its weights stay exactly ternary.

A block of llama.cpp's ternary types holds its codes and one fp16 scale; our scales are fp16 values, so what comes out
of a block is the effective weight itself. Activations are another matter: llama.cpp rounds them to 8 bits by blocks of
32 or 256, we by token, so logits agree to what that makes.

    type    bits a weight   a row is a multiple of
    tq2_0   2.0625          256
    tq1_0   1.6875          256
    q2_0    2.25            64     for GPUs; slow on x86
    q4_0    4.5             32     the oldest, read everywhere
    f16     16              1

Shapes: O out_features, I in_features.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparse_bitnet.checkpoint.directory import whole_file
from sparse_bitnet.checkpoint.loading import open_model, resolve_source
from sparse_bitnet.interop.gguf_tokenizer import add_tokenizer
from sparse_bitnet.nn.layer import PackedLayer
from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.nn.stored_settings import named_layers
from sparse_bitnet.nn.swap import convert

Q2_0 = 42  # its number in llama.cpp; gguf 0.19 does not know it by name
ROW_MULTIPLES = {"tq2_0": 256, "tq1_0": 256, "q2_0": 64, "q4_0": 32, "f16": 1}
EMBEDDINGS = ("f16", "q8_0")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FALLBACKS = ("q4_0", "f16")  # for rows that are no multiple
SMALLEST_SCALE = 2.0**-14  # below, fp16 has fewer bits
ROPE_SCALINGS = {
    "default": gguf.RopeScalingType.NONE,
    "linear": gguf.RopeScalingType.LINEAR,
    "llama3": gguf.RopeScalingType.NONE,  # its factors are a tensor
    "yarn": gguf.RopeScalingType.YARN,
}
YARN_FIXED: dict[str, tuple[Any, ...]] = {"beta_fast": (32, None), "beta_slow": (1, None), "truncate": (True,)}
"""What llama.cpp (build 11549) takes whatever the file says: for these architectures it does not read `yarn_beta_*`."""
ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "llama": gguf.MODEL_ARCH.LLAMA,
}


@dataclass(frozen=True)
class GgufExport:
    """What was written: how many tensors of each type, the bytes of the file, and what a user should know."""

    tensors: dict[str, int]
    bytes: int
    remarks: tuple[str, ...]


def export_gguf(source: str, output: Path, type: str = "auto", embedding: str = "f16") -> GgufExport:
    """Write the packed or latent checkpoint `source`, tokenizer included, to the file `output`, whole or not at all.

    type       of the ternary weights, see above; `auto` is tq2_0. Rows that are no multiple take q4_0, or else f16
    embedding  f16, or q8_0, which rounds embedding and head to 8 bits: half the bytes, which a token reads too

    ValueError for a model without ternary weights, an architecture or tokenizer that is not known, or an existing file.
    """
    if type != "auto" and type not in ROW_MULTIPLES:
        raise ValueError(f"--type {type} is not one of auto, {', '.join(ROW_MULTIPLES)}")
    if embedding not in EMBEDDINGS:
        raise ValueError(f"--embedding {embedding} is not one of {', '.join(EMBEDDINGS)}")
    if output.exists():
        raise ValueError(f"{output} exists: remove it or choose another name")
    directory = Path(resolve_source(source))
    if not directory.is_dir():
        raise ValueError(f"{source} is no directory: download the model first")
    model = open_model(source)
    config: Any = model.config
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{source}: model_type {config.model_type} is not one that can be exported: {known}")
    layers = [layer for _, layer in named_layers(model)]
    if not layers:
        raise ValueError(f"{source} has no ternary weights: export a checkpoint of `train` or `convert`")
    packed = model if isinstance(layers[0], PackedLayer) else convert(model)
    with whole_file(output) as staging:
        writer = gguf.GGUFWriter(staging, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
        _add_settings(writer, config, directory.name, _wanted(type))
        remarks = add_tokenizer(writer, directory, config)
        counts, more = _add_tensors(writer, packed, _wanted(type), embedding)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return GgufExport(dict(counts), output.stat().st_size, (*remarks, *more))


def _wanted(type: str) -> str:
    return "tq2_0" if type == "auto" else type


def _add_settings(writer: gguf.GGUFWriter, config: Any, name: str, type: str) -> None:
    file_types = {
        "tq2_0": gguf.LlamaFileType.MOSTLY_TQ2_0, "tq1_0": gguf.LlamaFileType.MOSTLY_TQ1_0,
        "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "q2_0": gguf.LlamaFileType.MOSTLY_F16,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
    }  # fmt: skip
    head = _head(config)
    writer.add_name(name)
    writer.add_file_type(file_types[type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config)


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Base and scaling of the rotary embedding; ValueError for settings that llama.cpp would not follow."""
    rope: dict[str, Any] = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_SCALINGS:
        raise ValueError(f"rope_type {kind} is not one that can be exported: {', '.join(ROPE_SCALINGS)}")
    writer.add_rope_freq_base(rope["rope_theta"])
    if ROPE_SCALINGS[kind] != gguf.RopeScalingType.NONE:
        writer.add_rope_scaling_type(ROPE_SCALINGS[kind])
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        _add_yarn(writer, config)
    if kind == "llama3":
        writer.add_tensor(gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS] + ".weight", _llama3_factors(config))


def _add_yarn(writer: gguf.GGUFWriter, config: Any) -> None:
    rope: dict[str, Any] = config.rope_parameters
    for key, allowed in YARN_FIXED.items():
        value = rope.get(key, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{key}={value} of rope_parameters cannot be exported: llama.cpp's {config.model_type} takes "
                f"{allowed[0]} whatever the file says; run this model with transformers"
            )
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", config.max_position_embeddings))
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
    usual = 0.1 * math.log(max(rope["factor"], 1)) + 1  # llama.cpp multiplies it with what the file says
    if attention != usual:
        writer.add_rope_scaling_attn_factors(attention / usual)


def _llama3_factors(config: Any) -> np.ndarray:
    """By what each frequency of a head is divided [head / 2] fp32."""
    head = _head(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, head, 2) / head)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    return (plain / stretched).numpy()


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_tensors(
    writer: gguf.GGUFWriter, model: PreTrainedModel, wanted: str, embedding: str
) -> tuple[Counter[str], tuple[str, ...]]:
    """Every tensor under llama.cpp's name; how many of each type, and remarks."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    ternary = dict(named_layers(model))
    counts: Counter[str] = Counter()
    small = 0
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_scale" or (name == HEAD and config.tie_word_embeddings):
            continue
        target = names.get_name(name, (".weight", ".bias"))
        if target is None:
            raise ValueError(f"{name} has no place in llama.cpp's {config.model_type}: the model cannot be exported")
        order = rows_as_llama(config, layer) if config.model_type == "llama" else None
        packed = ternary.get(layer)
        if isinstance(packed, PackedLinear) and kind == "weight":
            codes = packed.codes() if order is None else packed.codes()[order]
            type = next(one for one in (wanted, *FALLBACKS) if packed.in_features % ROW_MULTIPLES[one] == 0)
            scale = np.float16(packed.weight_scale.item())
            small += float(scale) < SMALLEST_SCALE
            counts[type] += 1
            _add_ternary(writer, target, codes.cpu(), scale, type)
            continue
        plain = tensor.float().cpu() if order is None else tensor.float().cpu()[order]
        if embedding == "q8_0" and name in (EMBEDDING, HEAD) and tensor.shape[1] % 32 == 0:
            counts["q8_0"] += 1
            eighths = gguf.quantize(plain.numpy(), GGMLQuantizationType.Q8_0)
            writer.add_tensor(target, eighths, raw_dtype=GGMLQuantizationType.Q8_0)
            continue
        array = plain.numpy().astype(np.float16 if tensor.ndim > 1 else np.float32)
        counts[str(array.dtype).replace("float", "f")] += 1
        writer.add_tensor(target, array)
    remarks = [f"{small} scales are below {SMALLEST_SCALE:g}, where fp16 is coarse"] * (small > 0)
    activations = {layer.recipe.activations for layer in ternary.values()} - {"int8"}
    if activations:
        remarks.append(f"activations are {activations.pop()} here, and llama.cpp rounds them to 8 bits")
    if "q4_0" in counts and wanted != "q4_0":
        remarks.append(
            f"{counts['q4_0']} weights are stored as q4_0: their rows are no multiple of {ROW_MULTIPLES[wanted]}"
        )
    return counts, tuple(remarks)


def rows_as_llama(config: Any, layer: str) -> Tensor | None:
    """The order of rows of a query or key projection: llama.cpp turns neighbouring dimensions, transformers halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if heads is None:
        return None
    head = _head(config)
    return torch.arange(heads * head).view(heads, 2, head // 2).transpose(1, 2).flatten()


def _add_ternary(writer: gguf.GGUFWriter, name: str, codes: Tensor, scale: np.float16, type: str) -> None:
    """Codes [O, I] int8 in {-1, 0, 1} and their scale, as blocks of `type`."""
    array = codes.numpy()
    if type == "f16":
        writer.add_tensor(name, array.astype(np.float16) * scale)
    elif type in ("tq1_0", "tq2_0"):
        kind = GGMLQuantizationType[type.upper()]
        blocks = gguf.quantize(array.astype(np.float32) * np.float32(scale), kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    elif type == "q4_0":
        writer.add_tensor(name, _q4_0(array, scale), raw_dtype=GGMLQuantizationType.Q4_0)
    else:
        gguf.GGML_QUANT_SIZES.setdefault(Q2_0, (64, 18))  # type: ignore[call-overload]
        writer.add_tensor(name, _q2_0(array, scale), raw_dtype=Q2_0)  # type: ignore[arg-type]


def _q4_0(codes: np.ndarray, scale: np.float16) -> np.ndarray:
    """Blocks of 32: the scale, then 16 bytes, element i in the low and i + 16 in the high half; value = half - 8."""
    halves = (codes + 8).astype(np.uint8).reshape(codes.shape[0], -1, 2, 16)
    return _with_scale(halves[:, :, 0] | halves[:, :, 1] << 4, scale)


def _q2_0(codes: np.ndarray, scale: np.float16) -> np.ndarray:
    """Blocks of 64: the scale, then 16 bytes of four elements, lowest bits first; value = field - 1."""
    fields = (codes + 1).astype(np.uint8).reshape(codes.shape[0], -1, 16, 4)
    return _with_scale((fields << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8), scale)


def _with_scale(blocks: np.ndarray, scale: np.float16) -> np.ndarray:
    """Blocks [O, N, bytes] uint8 -> rows [O, N * (2 + bytes)], each block behind its scale."""
    scales = np.broadcast_to(np.frombuffer(scale.tobytes(), np.uint8), (*blocks.shape[:2], 2))
    return np.concatenate([scales, blocks], axis=-1).reshape(blocks.shape[0], -1)
