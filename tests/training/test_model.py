"""The layers that a run trains are those that the settings ask for, in the dry run too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet import Recipe, prepare
from sparse_bitnet.nn.stored_settings import latent_layers
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.model import build_model
from sparse_bitnet.training.plan import describe_plan
from sparse_bitnet.training.run import train

Settings = Callable[..., TrainConfig]

MLP_ALONE = "49,152 in sparse ternary layers"
ALL = "73,728 in sparse ternary layers"


@pytest.fixture
def latent(dense_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A latent checkpoint whose attention was ignored."""
    directory = tmp_path / "latent"
    prepare(dense_model(), Recipe("6:8"), ignore=["lm_head", "self_attn"]).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
def test_a_stage_that_divides_no_row_is_told_before_training(settings: Settings, tmp_path: Path, dry: bool) -> None:
    config = settings("recipe.pattern=2:4", "schedule.kind=gradual", "schedule.patterns=['4:4', '5:7', '2:4']")
    message = (
        r"in_features=64 is not a multiple of m=7 \(model\.layers\.0\.self_attn\.q_proj, pattern 5:7\): every stage"
    )
    with pytest.raises(ValueError, match=message):
        describe_plan(config) if dry else train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_pattern_that_divides_no_row_of_a_latent_checkpoint_is_told(
    settings: Settings, latent: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = settings(f"model.source={latent}", "recipe.pattern=5:7")
    with pytest.raises(ValueError, match=r"m=7 \(model\.layers\.0\.mlp\.gate_proj, pattern 5:7\)"):
        build_model(config, tokenizer)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["recipe.ignore=[lm_head, self_attn]"],
        ["recipe.targets=[mlp]", "recipe.indivisible=skip"],
        ["recipe.targets=[mlp]", "recipe.pattern=2:4"],
    ],
    ids=str,
)
def test_a_latent_checkpoint_keeps_its_layers(
    settings: Settings, latent: Path, tokenizer: PreTrainedTokenizerBase, overrides: list[str]
) -> None:
    config = settings(f"model.source={latent}", *overrides)
    model = build_model(config, tokenizer)
    assert all("mlp" in name for name in latent_layers(model)) and len(latent_layers(model)) == 6
    assert model.config.quantization_config.to_dict()["quant_method"] == "sparse_bitnet"
    assert MLP_ALONE in describe_plan(config)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("recipe.ignore=[lm_head, layers.1]", "model.layers.0.self_attn.k_proj"),
        ("recipe.targets=[mlp.up_proj]", "model.layers.0.mlp.down_proj"),
        ("recipe.indivisible=skip", "model.layers.0.self_attn.k_proj"),
    ],
)
def test_a_choice_of_layers_that_a_latent_checkpoint_has_not_is_refused(
    settings: Settings, latent: Path, tokenizer: PreTrainedTokenizerBase, override: str, named: str
) -> None:
    config = settings(f"model.source={latent}", override)
    for build in (lambda: build_model(config, tokenizer), lambda: describe_plan(config)):
        with pytest.raises(
            ValueError, match=rf"has its sparse ternary layers already, .*would choose others \({named}\)"
        ):
            build()


def test_a_dry_run_of_the_shape_alone_chooses_the_layers_anew(
    settings: Settings, latent: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = settings(f"model.source={latent}", "model.weights=random")
    assert ALL in describe_plan(config)
    assert len(latent_layers(build_model(config, tokenizer))) == 14


def test_a_dry_run_refuses_a_latent_checkpoint_of_another_recipe(settings: Settings, latent: Path) -> None:
    with pytest.raises(ValueError, match="of a recipe only the pattern can change"):
        describe_plan(settings(f"model.source={latent}", "recipe.values=sign"))
