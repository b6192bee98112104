"""Model directories: written whole or not at all, and what is wrong with one is told before it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from sparse_bitnet import convert
from sparse_bitnet.checkpoint.directory import check_directory, whole_directory, write_text
from sparse_bitnet.checkpoint.loading import open_model


@pytest.fixture
def directory(latent_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    convert(latent_model()).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


@pytest.fixture
def small_disk(mount: Callable[[str], Path]) -> Path:
    return mount("256k")


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError, match=r".*") as caught:
        open_model(str(directory))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_directory_opens(directory: Path) -> None:
    check_directory(directory)
    assert open_model(str(directory)).config.hidden_size == 64


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nothing")


def test_a_directory_without_a_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal(directory)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\x00"])
def test_a_damaged_config(directory: Path, content: str) -> None:
    (directory / "config.json").write_text(content)
    assert "config.json" in refusal(directory)


def test_a_missing_shard(directory: Path) -> None:
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(directory)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_shard(directory: Path, length: int) -> None:
    shard = sorted(directory.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:length])
    message = refusal(directory)
    assert shard.name in message
    assert "truncated or not safetensors" in message


def test_a_directory_without_weights(directory: Path) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    assert "holds no model.safetensors" in refusal(directory)


def test_a_dense_checkpoint_with_a_tensor_missing_is_refused(
    dense_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = dense_model()
    model.save_pretrained(tmp_path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.0.mlp.up_proj.weight is missing" in refusal(tmp_path)


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "model") as staging:
        (staging / "file").write_text("content")
        assert not (tmp_path / "model").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "file").read_text() == "content"


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), whole_directory(tmp_path / "model") as staging:
        (staging / "file").write_text("content")
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("mine")
    with pytest.raises(ValueError, match="exists already"), whole_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model" / "file").read_text() == "mine"


def test_a_directory_is_replaced_only_once_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "file").write_text("old")
    with pytest.raises(RuntimeError, match="stop"), whole_directory(tmp_path / "model", replace=True):
        raise RuntimeError("stop")
    assert (tmp_path / "model" / "file").read_text() == "old"
    with whole_directory(tmp_path / "model", replace=True) as staging:
        (staging / "other").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["other"]


def test_a_full_disk_leaves_nothing_behind(small_disk: Path) -> None:
    with pytest.raises(OSError, match="model could not be written"), whole_directory(small_disk / "model") as staging:
        save_file({"weight": torch.zeros(10**6)}, staging / "model.safetensors")
    assert list(small_disk.iterdir()) == []


def test_a_small_file_is_replaced_whole_or_not_at_all(small_disk: Path) -> None:
    file = small_disk / "config.yaml"
    write_text(file, "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "x" * 10**6)
    assert file.read_text() == "old"
    assert [path.name for path in small_disk.iterdir()] == ["config.yaml"]
