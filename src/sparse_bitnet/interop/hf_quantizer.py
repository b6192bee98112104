"""Checkpoints for transformers: `AutoModelForCausalLM.from_pretrained` opens them, latent or packed.

Imported by the hook of the package once transformers has its register of quantisation methods; importing registers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparse_bitnet.checkpoint.directory import stored_tensor_names
from sparse_bitnet.nn.experts import Experts
from sparse_bitnet.nn.layer import LatentLayer, PackedLayer
from sparse_bitnet.nn.loading import exchange_for_loading, unpack_to_linear
from sparse_bitnet.nn.packed_linear import check_stored
from sparse_bitnet.nn.stored_settings import LATENT, QUANT_METHOD, StoredSettings, named_layers


@register_quantization_config(QUANT_METHOD)
class SparseBitNetConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json as transformers holds it. ValueError where it cannot be read."""

    def __init__(self, **stored: Any) -> None:
        self.settings = StoredSettings.from_dict(stored)
        self.quant_method: Any = QUANT_METHOD  # a plain name, where transformers types its own enum

    def to_dict(self) -> dict[str, Any]:
        return self.settings.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class SparseBitNetQuantizer(HfQuantizer):
    """Exchanges the layers before the tensors are read, and checks them afterwards."""

    @property
    def settings(self) -> StoredSettings:
        config: Any = self.quantization_config
        return config.settings

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        stored = None if checkpoint_files is None else stored_tensor_names(checkpoint_files)
        exchange_for_loading(model, self.settings, () if stored is None else _new_heads(model, stored))
        if stored is not None:
            _check_tensors_present(model, stored, ", ".join(checkpoint_files or ()))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, layer in named_layers(model):
            if isinstance(layer, PackedLayer):
                check_stored(name, layer.weight, layer.weight_scale, layer.format)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        unpack_to_linear(model, dtype)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters: gradients pass through packed layers too."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Without adapters."""
        return self.settings.format == LATENT

    @property
    def is_compileable(self) -> bool:
        return True


def _new_heads(model: nn.Module, stored: set[str]) -> list[str]:
    """Linear layers outside of the base model that the checkpoint has nothing of: it is of another class."""
    if getattr(model, "base_model", model) is model:
        return []
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    outside = [name for name in linears if not name.startswith(prefix)]
    return [name for name in outside if not _is_stored(f"{name}.weight", stored, prefix)]


def _check_tensors_present(model: nn.Module, stored: set[str], files: str) -> None:
    """ValueError where a layer's tensors are not in the files: transformers would go on with arbitrary values.

    Experts in one tensor may lie there expert by expert, as transformers writes them back.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    ours = {name for name, module in model.named_modules() if isinstance(module, LatentLayer | PackedLayer | Experts)}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] in ours}
    apart = {name: tensor for name, tensor in wanted.items() if not _is_stored(name, stored, prefix)}
    missing = [name for name in revert_weight_conversion(model, apart) if not _is_stored(name, stored, prefix)]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{files}: tensor {missing[0]} is missing: the checkpoint is incomplete, save it again")


def _is_stored(name: str, stored: set[str], prefix: str) -> bool:
    """Whether the tensor is there, be it that the model or the checkpoint is the base model alone."""
    return not stored.isdisjoint((name, prefix + name, name.removeprefix(prefix)))
