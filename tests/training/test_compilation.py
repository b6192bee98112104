"""Compiled block by block, a model is the same model: names, hooks, and what it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn
from transformers import PreTrainedModel

from sparse_bitnet.training.compilation import compile_blocks
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile looks


@pytest.fixture(autouse=True)
def traced_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="aot_eager", fullgraph=True))


def is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None


def test_the_repeated_blocks_are_compiled_and_keep_their_names(latent_model: Callable[..., PreTrainedModel]) -> None:
    model = latent_model()
    names = list(model.state_dict())
    compile_blocks(model)
    assert [name for name, module in model.named_modules() if is_compiled(module)] == [
        "model.layers.0",
        "model.layers.1",
    ]
    assert list(model.state_dict()) == names


def test_a_module_without_blocks_is_compiled_whole() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    compile_blocks(model)
    assert is_compiled(model)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_run_learns_the_same(
    settings: Callable[..., TrainConfig], checkpointing: str, tmp_path: Path
) -> None:
    losses = []
    for compiled in ("false", "true"):
        overrides = (f"training.compile={compiled}", f"training.gradient_checkpointing={checkpointing}")
        result = train(settings(*overrides, f"output_dir={tmp_path / compiled}"))
        losses.append([event["loss"] for event in result.log if "loss" in event])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
