"""LoRA over a packed, frozen model: PEFT's own LoRA layer around ours, which has no weight to merge into.

>>> base = AutoModelForCausalLM.from_pretrained("packed")
>>> model = get_peft_model(base, with_packed_layers(LoraConfig(r=8, target_modules=["q_proj", "v_proj"])))
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from sparse_bitnet.nn.packed_linear import PackedLinear


class LoraPackedLinear(Linear):
    """y = packed(x) + B A x * scaling; the base stays ternary, exactly."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # any that is registered and not PEFT's own
            super().__init__(*args, **settings)

    @property
    def lora_variants(self) -> dict[Any, Any]:
        return {(): None}  # DoRA and others read the base weight, which is packed: PEFT refuses them

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """ValueError: ternary codes plus an adapter are ternary no more."""
        raise ValueError(
            "an adapter cannot be merged into packed ternary weights: keep it beside them (save_pretrained, "
            "interop.gguf_adapter), or open the base with `.dequantize()` and merge there, at 16 bits a weight"
        )


def with_packed_layers(config: LoraConfig) -> LoraConfig:
    """`config`, which may now name packed layers; also for the one given to `PeftModel.from_pretrained(config=...)`."""
    config._register_custom_module({PackedLinear: LoraPackedLinear})  # PEFT's documented way, marked experimental
    return config
