"""vLLM serves a packed directory: `vllm serve DIRECTORY`, once both packages are installed.

vLLM finds this file by its entry point `vllm.general_plugins` and asks the config for a method for each linear layer.
It fuses q, k, v and gate, up, which have scales of their own: a fused layer has a scale for each, as `parts` of it.

Written from vLLM's sources (model_executor/layers/linear.py at 0036d38, quantization/base_config.py at 026bb17,
quantization/__init__.py at 05d9095, parameter.py at 0045689) and tested beside a double of them, **not run with vLLM
itself**, nor on a GPU. Split over several GPUs by columns of the input (o_proj, down_proj), each rounds its part of a
token by the largest of that part, in steps as fine as the training's or finer.

Shapes: O out_features and I in_features of this GPU's share, P matrices in a fused layer, B bytes a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.parameter import (  # pyright: ignore[reportMissingImports]
    ModelWeightParameter,
    PerTensorScaleParameter,
)

from sparse_bitnet.formats import get_format
from sparse_bitnet.kernels.packed_linear import PackedLayout, packed_linear
from sparse_bitnet.nn.packed_linear import check_stored
from sparse_bitnet.nn.stored_settings import LATENT, QUANT_METHOD, StoredSettings

NO_CODES = 255  # what a weight holds before it is read: most formats never write it
COPIES = 40  # of a row, put end to end, end on a byte in every format


def register() -> None:
    """The entry point, which may be called again: importing this file has registered the config."""


@register_quantization_config(QUANT_METHOD)
class SparseBitNetConfig(QuantizationConfig):
    """`quantization_config` of config.json as vLLM holds it. ValueError where it cannot be served."""

    def __init__(self, settings: StoredSettings) -> None:
        super().__init__()
        if settings.format == LATENT:
            raise ValueError("the checkpoint is latent: `sparse-bitnet convert` packs it")
        if settings.parts:
            raise ValueError(
                f"{min(settings.parts)} is fused in the checkpoint: the plugin reads layers that vLLM fuses"
            )
        self.settings = settings

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseBitNetConfig:
        return cls(StoredSettings.from_dict(config))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if any(kind.__name__ == "FusedMoE" for kind in type(layer).__mro__):  # by name: its module loads its kernels
            raise ValueError(f"{prefix} is a mixture of experts, which the plugin does not have")
        if not isinstance(layer, LinearBase):
            return None
        return UnquantizedLinearMethod() if self._is_left(prefix) else SparseBitNetLinearMethod(self.settings, prefix)

    def _is_left(self, prefix: str) -> bool:
        """Whether the layer is in floats; ValueError where vLLM fuses some that are with some that are not."""
        above, dot, last = prefix.rpartition(".")
        names = [f"{above}{dot}{part}" for part in self.packed_modules_mapping.get(last, [last])]
        left = [name for name in names if name in self.settings.ignore]
        if left and len(left) < len(names):
            raise ValueError(f"{prefix}: {left[0]} is not packed and the others are: pack all of {', '.join(names)}")
        return bool(left)


@register_weight_loader_v2_supported_method
class SparseBitNetLinearMethod(LinearMethodBase):
    """Packed weights [O, B] uint8 and their scales [P] fp32, multiplied by the kernels of this package."""

    def __init__(self, settings: StoredSettings, prefix: str) -> None:
        self.settings, self.prefix = settings, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if input_size_per_partition != input_size:
            self._check_share(input_size_per_partition, input_size)
        loader, parts = extra_weight_attrs["weight_loader"], tuple(output_partition_sizes)
        width = get_format(self.settings.format).bytes_per_row(input_size_per_partition)
        weight = torch.full((sum(parts), width), NO_CODES, dtype=torch.uint8)
        scale = torch.full((len(parts),), torch.nan, dtype=torch.float32)  # vLLM's default is that of the model
        layer.register_parameter(
            "weight", ModelWeightParameter(data=weight, input_dim=1, output_dim=0, weight_loader=loader)
        )
        layer.register_parameter("weight_scale", PerTensorScaleParameter(data=scale, weight_loader=loader))
        activations = self.settings.recipe.activations
        self.layout = PackedLayout(
            self.settings.format, input_size_per_partition, activations, parts if len(parts) > 1 else ()
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        check_stored(self.prefix, layer.weight.data, layer.weight_scale.data, get_format(self.settings.format))
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        layer.weight_scale = nn.Parameter(layer.weight_scale.data, requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return packed_linear(x, layer.weight, layer.weight_scale, bias, self.layout)

    def _check_share(self, share: int, whole: int) -> None:
        """ValueError where a GPU's share of the input would cut a group of n:m, or a byte."""
        layout, m = get_format(self.settings.format), self.settings.recipe.pattern.m
        if share % m or layout.bytes_per_row(COPIES * share) != COPIES * layout.bytes_per_row(share):
            raise ValueError(
                f"{self.prefix}: {whole} columns over {whole // share} GPUs are {share} each, which cuts a group "
                f"of {m} or a byte of format {layout.name}: take fewer GPUs (--tensor-parallel-size) or convert to i2"
            )
