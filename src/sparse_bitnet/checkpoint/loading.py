"""Open any causal language model, ours or not, so that what is wrong with it is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

import sparse_bitnet  # noqa: F401  registers the reader of our checkpoints
from sparse_bitnet.checkpoint.directory import check_directory, is_no_hub_id


def resolve_source(source: str) -> str:
    """A checked model directory, or a Hub id as it is; ValueError where `source` can be neither."""
    path = Path(source).expanduser()
    if path.exists():
        check_directory(path)
        return str(path)
    if is_no_hub_id(source):
        raise ValueError(f"{source}: no such directory")
    return source


def open_model(source: str, dtype: torch.dtype | str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The model in a directory or on the Hub, every tensor of it read from there; ValueError in one line otherwise."""
    name = resolve_source(source)
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        if name == source and not Path(name).is_dir():
            raise ValueError(f"{source}: no such directory, and as a Hub id it cannot be opened: {reason}") from error
        raise ValueError(f"{source} cannot be opened: {reason}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{source}: tensor {missing[0]} is missing ({len(missing)} in all): the checkpoint is incomplete"
        )
    return model.to(device)
