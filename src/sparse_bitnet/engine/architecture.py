"""What the engine has to know of a model, from its config.json: Qwen2, Qwen3 and Llama."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_bitnet.checkpoint.directory import CONFIG, GENERATION_CONFIG, check_directory, read_json
from sparse_bitnet.engine.rotary import Rotary
from sparse_bitnet.kernels.dispatch import FORCE_VARIABLE
from sparse_bitnet.kernels.packed_linear import NATIVE, OPERATOR
from sparse_bitnet.kernels.packed_linear.reference import WIDEST_EXACT_IN_FP32
from sparse_bitnet.nn.stored_settings import LATENT, QUANT_METHOD, StoredSettings

MODEL_TYPES = ("qwen2", "qwen3", "llama")
LARGEST_NUMBER = 2**31 - 1
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def check_tokens(prompt: Sequence[int], vocabulary: int) -> None:
    """ValueError for a prompt without tokens, or with one that is none of the vocabulary."""
    if len(prompt) == 0:
        raise ValueError("the prompt is empty: give at least one token to go on from")
    outside = next((token for token in prompt if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise ValueError(f"token {outside} is not in the vocabulary of {vocabulary}: is it the model's tokenizer?")


class NotSupportedError(ValueError):
    """A model that is whole, but that only transformers can run."""


@dataclass(frozen=True)
class Architecture:
    """H hidden, F ffn, D head; biased are names of projections, has_head_norms is Qwen3's norm of queries and keys."""

    settings: StoredSettings
    vocabulary: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    context: int
    epsilon: float
    rotary: Rotary
    biased: frozenset[str]
    has_head_norms: bool
    is_tied: bool

    @classmethod
    def read(cls, directory: Path) -> Architecture:
        """ValueError where config.json is damaged, `NotSupportedError` where the engine has no such model."""
        config = read_json(directory / CONFIG)
        try:
            return cls.from_config(config)
        except NotSupportedError:
            raise
        except (ValueError, TypeError, OverflowError, ArithmeticError) as error:
            raise ValueError(f"{directory / CONFIG}: {error}") from error

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Architecture:
        """From the fields of config.json under the names and with the defaults of transformers."""
        stored = config.get("quantization_config")
        if not isinstance(stored, dict) or stored.get("quant_method") != QUANT_METHOD:
            raise NotSupportedError("the model is not packed: `sparse-bitnet convert` packs one that was trained here")
        settings = StoredSettings.from_dict(stored)
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise NotSupportedError(f"model_type {kind!r} is none of {', '.join(MODEL_TYPES)}")
        heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
        head = _number(config, "head_dim", 128 if kind == "qwen3" else hidden // heads)
        architecture = cls(
            settings,
            vocabulary=_number(config, "vocab_size"),
            hidden=hidden,
            ffn=_number(config, "intermediate_size"),
            layers=_number(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_number(config, "num_key_value_heads", heads),
            head=head,
            context=_number(config, "max_position_embeddings"),
            epsilon=_positive(config, "rms_norm_eps", 1e-6),
            rotary=Rotary.from_config(config, head),
            biased=_biased(config),
            has_head_norms=kind == "qwen3",
            is_tied=_flag(config, "tie_word_embeddings"),
        )
        architecture._check(config)
        return architecture

    def _check(self, config: dict[str, Any]) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"num_attention_heads={self.heads} is no multiple of num_key_value_heads={self.kv_heads}")
        if self.head % 2:
            raise ValueError(f"head_dim={self.head} is odd, and a rotary embedding turns pairs")
        if self.rotary.kind not in Rotary.KINDS:
            raise NotSupportedError(f"rope_type {self.rotary.kind!r} is none of {', '.join(Rotary.KINDS)}")
        if self.settings.format == LATENT:
            raise NotSupportedError("the checkpoint is latent: `sparse-bitnet convert` packs it")
        if self.settings.recipe.activations == "none":
            raise NotSupportedError("activations='none' are no integers, which the native kernels multiply")
        if self.settings.parts:
            raise NotSupportedError(f"{min(self.settings.parts)} is a fused projection")
        dense = [name for name in self.settings.ignore if name.rpartition(".")[2] in (*ATTENTION, *MLP)]
        if dense:
            raise NotSupportedError(f"{dense[0]} is not packed")
        if config.get("hidden_act", "silu") != "silu":
            raise NotSupportedError(f"hidden_act {config['hidden_act']!r} is not silu")
        kinds = set(config.get("layer_types") or ["full_attention"])
        if kinds != {"full_attention"} or _flag(config, "use_sliding_window"):
            raise NotSupportedError("the model has sliding attention")
        widest = max(self.hidden, self.ffn, self.heads * self.head)
        if widest > WIDEST_EXACT_IN_FP32:
            raise NotSupportedError(f"in_features={widest} is beyond {WIDEST_EXACT_IN_FP32}")


def obstacle(source: str) -> str | None:
    """Why the engine cannot run the model in directory `source`, None where it can; ValueError where it is damaged."""
    forced = OPERATOR.forced()
    if forced not in (None, NATIVE.name):
        return f"{FORCE_VARIABLE}={forced} asks for another kernel"
    if not Path(source).is_dir():
        return f"{source} is not a directory"
    check_directory(source)
    try:
        Architecture.read(Path(source))
    except NotSupportedError as error:
        return str(error)
    return OPERATOR.obstacle(NATIVE)


def end_tokens(directory: Path) -> frozenset[int]:
    """Those that end a text, of generation_config.json or else config.json; ValueError where they are no numbers."""
    for file in (directory / GENERATION_CONFIG, directory / CONFIG):
        found = read_json(file).get("eos_token_id") if file.exists() else None
        if found is not None:
            tokens = found if isinstance(found, list) else [found]
            if not all(isinstance(token, int) for token in tokens):
                raise ValueError(f"{file}: eos_token_id={found!r} is neither a token nor a list of them")
            return frozenset(tokens)
    return frozenset()


def _biased(config: dict[str, Any]) -> frozenset[str]:
    if config["model_type"] == "qwen2":
        return frozenset(ATTENTION[:3])
    attention = ATTENTION if _flag(config, "attention_bias") else ()
    mlp = MLP if config["model_type"] == "llama" and _flag(config, "mlp_bias") else ()
    return frozenset((*attention, *mlp))


def _number(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_NUMBER:
        raise ValueError(f"{name}={value!r} is no number from 1 to {LARGEST_NUMBER}")
    return value


def _positive(config: dict[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name}={value!r} is no number between 0 and 1")
    return float(value)


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is neither true nor false")
    return value
