"""The tensors of a packed model in its safetensors files, which are mapped: what is not converted stays in the file.

Shapes: O out_features, I in_features, B bytes a row, H hidden_size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_bitnet.checkpoint.directory import weight_files
from sparse_bitnet.formats import get_format
from sparse_bitnet.kernels.packed_linear.cpu_native import DTYPES

ROWS_CHECKED = 16  # at a time: a format may take many bytes for one to look at it


class StoredTensors:
    """Tensors by name, of the shape and dtype that is asked for; ValueError names directory, tensor and remedy."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: dict[str, Any] = {}
        for file in weight_files(directory):
            try:
                tensors = safe_open(file, framework="pt")
                self._files.update(dict.fromkeys(tensors.keys(), tensors))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} cannot be read ({error}): truncated or not safetensors") from error

    def floats(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """In the file's own dtype and memory: fp32, bf16 or fp16."""
        tensor = self._get(name, shape)
        if tensor.dtype not in DTYPES:
            raise self._damaged(name, f"is {tensor.dtype}, not one of {', '.join(map(str, DTYPES))}")
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    def fp32(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A copy in fp32: of norms and biases, which are small."""
        return self.floats(name, shape).to(torch.float32, copy=True)

    def scale(self, name: str) -> Tensor:
        scale = self.fp32(name, (1,))
        if not bool(torch.isfinite(scale).all() and (scale > 0).all()):
            raise self._damaged(name, "is not a positive number")
        return scale

    def packed(self, name: str, rows: int, in_features: int, format: str) -> Tensor:
        """[O, B] uint8 in the file's memory."""
        layout = get_format(format)
        tensor = self._get(name, (rows, layout.bytes_per_row(in_features)))
        if tensor.dtype != torch.uint8 or any(map(layout.has_invalid_codes, tensor.split(ROWS_CHECKED))):
            raise self._damaged(name, f"is not of format {format}")
        return tensor

    def _get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._files:
            raise self._damaged(name, "is missing")
        try:
            tensor: Tensor = self._files[name].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise self._damaged(name, f"cannot be read ({error})") from error
        if tensor.shape != shape:
            raise self._damaged(name, f"is {list(tensor.shape)}, not {list(shape)}")
        return tensor.contiguous()

    def _damaged(self, name: str, what: str) -> ValueError:
        return ValueError(f"{self.directory}: tensor {name} {what}: the checkpoint is damaged, convert it again")
