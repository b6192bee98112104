"""The switch of a run for sparse tensor cores: asked for in vain it is refused, left alone it picks what is faster."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet import Recipe
from sparse_bitnet.training import sparse_forward
from sparse_bitnet.training.sparse_forward import SparseForward

CPU = torch.device("cpu")
SHAPES = [(64, 64), (64, 128), (12, 64)]


def test_what_the_machine_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training\.sparse_forward=true: .*(cpu|GPU|cuda)"):
        SparseForward(True, 256, 1, torch.bfloat16, CPU)


@pytest.mark.parametrize("wanted", ["auto", False])
def test_on_a_cpu_all_products_are_dense(wanted: str | bool) -> None:
    assert SparseForward(wanted, 256, 1, torch.float32, CPU)(SHAPES, Recipe("2:4")) == frozenset()  # type: ignore


def test_auto_takes_what_is_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gains(shapes: set[tuple[int, int]], *_: object) -> dict[tuple[int, int], float]:
        assert (12, 64) not in shapes  # it has no sparse form
        return {(64, 64): 1.19, (64, 128): 1.7}

    monkeypatch.setattr(sparse_forward, "sparse_tensor_core_obstacle", lambda *_: None)
    monkeypatch.setattr(sparse_forward, "sparse_forward_gains", gains)
    choose = SparseForward("auto", 256, 1, torch.bfloat16, torch.device("cuda"))
    assert choose(SHAPES, Recipe("2:4")) == {(64, 128)}
    assert "64 x 64 1.19, 64 x 128 1.70; used from 1.2 on" in capsys.readouterr().out
    assert SparseForward(True, 256, 1, torch.bfloat16, torch.device("cuda"))(SHAPES, Recipe("2:4")) == {
        (64, 64),
        (64, 128),
    }
    assert choose(SHAPES, Recipe("8:8")) == frozenset()
