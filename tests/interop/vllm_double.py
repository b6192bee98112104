"""The part of vLLM that a quantisation method meets, in one process, with as many shares of a model as one likes.

Names and signatures are those of vLLM's sources (model_executor/layers/linear.py at 0036d38, parameter.py at 0045689,
quantization/base_config.py at 026bb17, quantization/__init__.py at 05d9095); `test_vllm_plugin.py` compares them with
an installed vLLM. What the layers do is written anew from what those do: which rows and columns of a stored tensor a
share gets, under which name, and when the method is called. `tensor_parallel` is what vLLM learns from its processes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

tensor_parallel = {"rank": 0, "size": 1}
WEIGHT_LOADER_V2_SUPPORTED: list[str] = []
QUANTIZATION_METHODS: dict[str, type[QuantizationConfig]] = {}


def register_weight_loader_v2_supported_method(cls):
    WEIGHT_LOADER_V2_SUPPORTED.append(cls.__name__)
    return cls


def register_quantization_config(quantization: str):
    def register(quant_config_cls):
        assert issubclass(quant_config_cls, QuantizationConfig)
        QUANTIZATION_METHODS[quantization] = quant_config_cls
        return quant_config_cls

    return register


class QuantizeMethodBase(ABC):
    @abstractmethod
    def create_weights(self, layer: nn.Module, *weight_args, **extra_weight_attrs): ...

    @abstractmethod
    def apply(self, layer: nn.Module, *args, **kwargs) -> Tensor: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        return


class QuantizationConfig(ABC):
    def __init__(self):
        super().__init__()
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def get_name(self) -> str: ...

    @abstractmethod
    def get_supported_act_dtypes(self) -> list[torch.dtype]: ...

    @classmethod
    @abstractmethod
    def get_min_capability(cls) -> int: ...

    @staticmethod
    @abstractmethod
    def get_config_filenames() -> list[str]: ...

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig: ...

    @abstractmethod
    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None: ...


class LinearMethodBase(QuantizeMethodBase):
    @abstractmethod
    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ): ...

    @abstractmethod
    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class BasevLLMParameter(Parameter):
    def __new__(cls, data: Tensor | None, **kwargs):
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data: Tensor, weight_loader: Callable):
        self.weight_loader = weight_loader
        self.tp_rank, self.tp_size = tensor_parallel["rank"], tensor_parallel["size"]


class ModelWeightParameter(BasevLLMParameter):
    def __init__(self, output_dim: int, input_dim: int, **kwargs):
        self.output_dim, self.input_dim = output_dim, input_dim
        super().__init__(**kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor):
        width = self.data.shape[self.input_dim]
        self.data.copy_(loaded_weight.narrow(self.input_dim, self.tp_rank * width, width))

    def load_rows(self, loaded_weight: Tensor, shard_offset: int, shard_size: int, shard_rank: int):
        rows = self.data.narrow(self.output_dim, shard_offset, shard_size)
        rows.copy_(loaded_weight.narrow(self.output_dim, shard_rank * shard_size, shard_size))


class PerTensorScaleParameter(BasevLLMParameter):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)

    def load_row_parallel_weight(self, loaded_weight: Tensor):
        assert self.data.shape == loaded_weight.shape
        self.data.copy_(loaded_weight)

    def load_scale(self, loaded_weight: Tensor, number: int):
        assert loaded_weight.shape == (1,)
        self.data[number].copy_(loaded_weight[0])


class LinearBase(nn.Module):
    def __init__(self, input_size: int, output_sizes: list[int], quant_config: QuantizationConfig, prefix: str) -> None:
        super().__init__()
        self.input_size, self.output_sizes = input_size, output_sizes
        self.tp_rank, self.tp_size = tensor_parallel["rank"], tensor_parallel["size"]
        method = quant_config.get_quant_method(self, prefix=prefix)
        if method is None:
            raise ValueError("All linear layers should support quant method.")
        self.quant_method = method

    def create(self, columns: int, rows: list[int]) -> None:
        name = self.quant_method.__class__.__name__
        assert name in WEIGHT_LOADER_V2_SUPPORTED or isinstance(self.quant_method, UnquantizedLinearMethod)
        self.quant_method.create_weights(
            layer=self,
            input_size_per_partition=columns,
            output_partition_sizes=rows,
            input_size=self.input_size,
            output_size=sum(self.output_sizes),
            params_dtype=torch.float32,
            weight_loader=self.weight_loader_v2,
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.quant_method.apply(self, x, bias)


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(
        self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
        **extra_weight_attrs,
    ):  # fmt: skip
        layer.weight = Parameter(torch.zeros(sum(output_partition_sizes), input_size_per_partition))

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


class MergedColumnParallelLinear(LinearBase):
    """Several matrices below each other, each split by rows; stored one by one, with shard ids 0, 1, ..."""

    def __init__(self, input_size: int, output_sizes: list[int], quant_config: QuantizationConfig, prefix: str = ""):
        super().__init__(input_size, output_sizes, quant_config, prefix)
        self.create(input_size, [size // self.tp_size for size in output_sizes])

    def weight_loader_v2(self, param, loaded_weight: Tensor, loaded_shard_id: int | None = None):
        if isinstance(param, PerTensorScaleParameter):
            param.load_scale(loaded_weight, loaded_shard_id)
            return
        offset = sum(self.output_sizes[:loaded_shard_id]) // self.tp_size
        param.load_rows(loaded_weight, offset, self.output_sizes[loaded_shard_id] // self.tp_size, self.tp_rank)


class QKVParallelLinear(LinearBase):
    """q, k and v split by heads; heads of k and v are there several times where the shares outnumber them."""

    def __init__(
        self, hidden_size: int, head_size: int, total_num_heads: int, total_num_kv_heads: int,
        quant_config: QuantizationConfig, prefix: str = "",
    ):  # fmt: skip
        size = tensor_parallel["size"]
        kv_heads, self.replicas = max(1, total_num_kv_heads // size), max(1, size // total_num_kv_heads)
        self.rows = [total_num_heads // size * head_size, kv_heads * head_size, kv_heads * head_size]
        super().__init__(hidden_size, [rows * size for rows in self.rows], quant_config, prefix)
        self.create(hidden_size, self.rows)

    def weight_loader_v2(self, param, loaded_weight: Tensor, loaded_shard_id: str | None = None):
        number = {"q": 0, "k": 1, "v": 2}[loaded_shard_id]
        if isinstance(param, PerTensorScaleParameter):
            param.load_scale(loaded_weight, number)
            return
        rank = self.tp_rank if number == 0 else self.tp_rank // self.replicas
        param.load_rows(loaded_weight, sum(self.rows[:number]), self.rows[number], rank)


class RowParallelLinear(LinearBase):
    """One matrix split by columns; the results of the shares are added."""

    def __init__(self, input_size: int, output_size: int, quant_config: QuantizationConfig, prefix: str = ""):
        super().__init__(input_size, [output_size], quant_config, prefix)
        self.create(input_size // self.tp_size, [output_size])

    def weight_loader_v2(self, param, loaded_weight: Tensor):
        param.load_row_parallel_weight(loaded_weight=loaded_weight)


NAMES = {
    "vllm": (),
    "vllm.model_executor": (),
    "vllm.model_executor.layers": (),
    "vllm.model_executor.layers.linear": (
        "LinearBase", "LinearMethodBase", "UnquantizedLinearMethod", "register_weight_loader_v2_supported_method",
    ),
    "vllm.model_executor.layers.quantization": ("register_quantization_config",),
    "vllm.model_executor.layers.quantization.base_config": ("QuantizationConfig", "QuantizeMethodBase"),
    "vllm.model_executor.parameter": ("ModelWeightParameter", "PerTensorScaleParameter"),
}  # fmt: skip


def modules() -> dict[str, ModuleType]:
    """To put into sys.modules, by name."""
    here, made = sys.modules[__name__], {}
    for name, members in NAMES.items():
        made[name] = ModuleType(name)
        for member in members:
            setattr(made[name], member, getattr(here, member))
    return made
