"""Settings: the defaults are the authors', the template says the same, and every mistake is one line that names it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from sparse_bitnet.training.config import TrainConfig, load_config
from sparse_bitnet.training.schedules import ResidualSchedule

TEMPLATE = files("sparse_bitnet.training").joinpath("train.yaml")
TUNED_FOR_TINY = {"steps", "block_size", "batch_size", "learning_rate", "warmup_steps", "final_learning_rate_share"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(TEMPLATE.read_text(encoding="utf-8"))
    return path


def names(settings: dict[str, object], prefix: str = "") -> set[str]:
    nested = [names(value, f"{prefix}{key}.") for key, value in settings.items() if isinstance(value, dict)]
    return {f"{prefix}{key}" for key in settings}.union(*nested)


def test_the_template_holds_every_setting_with_its_default(file: Path) -> None:
    import yaml

    from sparse_bitnet.training.config import YamlLoader

    written, defaults = load_config(file, []), TrainConfig()
    assert names(yaml.load(file.read_text(), YamlLoader)) == names(defaults.model_dump())
    assert written.model_dump(exclude={"training": TUNED_FOR_TINY}) == defaults.model_dump(
        exclude={"training": TUNED_FOR_TINY}
    )


def test_the_defaults_are_the_authors() -> None:
    training = TrainConfig().training
    assert (training.learning_rate, training.warmup_steps, training.clip) == (3e-4, 1000, 1.0)
    assert training.learning_rate * training.final_learning_rate_share == pytest.approx(1e-5)
    assert (training.betas, training.weight_decay, training.weight_decay_until) == ((0.9, 0.95), 0.1, 0.5)


def test_what_is_written_reads_back_equal(file: Path) -> None:
    config = load_config(file, ["recipe.pattern=2:4", "schedule.kind=dense-to-sparse", "schedule.at=0.25"])
    file.write_text(config.to_yaml())
    assert load_config(file, []) == config


@pytest.mark.parametrize("pattern", ["6:8", "2:4", "12:16", "31:32"])
def test_a_pattern_without_quotes_is_a_pattern(file: Path, pattern: str) -> None:
    file.write_text(f"recipe:\n  pattern: {pattern}\n")
    assert load_config(file, []).recipe.pattern == pattern
    assert load_config(None, [f"recipe.pattern={pattern}"]).recipe.pattern == pattern


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", ".001"])
def test_floats_in_any_spelling(number: str) -> None:
    assert load_config(None, [f"training.learning_rate={number}"]).training.learning_rate == 0.001


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    file.write_text("# nothing\n")
    assert load_config(file, []) == TrainConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=5", "training.stepz: unknown setting; `sparse-bitnet init` writes a file with all of them"),
        ("colour=red", "colour: unknown setting"),
        ("training.steps=many", "training.steps: Input should be a valid integer"),
        ("training.steps=0", "training.steps: Input should be greater than 0 (got 0)"),
        ("training.learning_rate=-1", "training.learning_rate: Input should be greater than 0 (got -1)"),
        ("recipe.pattern=9:8", "recipe: pattern 9:8: n must lie between 1 and m=8; 8:8 is dense"),
        ("recipe.pattern=68", "recipe.pattern: Input should be a valid string (got 68)"),
        ("recipe.pattern=six", "recipe: pattern 'six' is not of the form n:m, for example '6:8'"),
        ("recipe.values=binary", "recipe.values: Input should be 'ternary', 'sign' or 'full' (got 'binary')"),
        ("schedule.patterns=[2:4]", "schedule.patterns is only used by kind: gradual"),
        ("schedule.kind=gradual", "schedule.patterns must end with recipe.pattern, 6:8"),
        ("schedule.at=1.5", "schedule.at: Input should be less than 1 (got 1.5)"),
        ("training", "'training' is not of the form section.field=value"),
        ("output_dir.x=1", "output_dir.x: output_dir is not a section"),
        ("training.steps=[", "training.steps=[ is not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".*") as refusal:
        load_config(file, [override])
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing.yaml: no such file; `sparse-bitnet init"):
        load_config(tmp_path / "nothing.yaml", [])
    for content, message in (("- a\n", "holds no settings"), ("a: [", "not valid YAML"), ("a: b: c", "not valid YAML")):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_config(tmp_path / "bad.yaml", [])


@pytest.mark.parametrize("setting", ["betas=[2,3]", "seed=-1", "learning_rate=.inf", "weight_decay=.inf"])
def test_numbers_out_of_range_are_refused_by_name(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"training\.{setting.partition('=')[0]}"):
        load_config(None, [f"training.{setting}"])


def test_sparse_forward_is_a_word_or_a_choice() -> None:
    assert load_config(None, []).training.sparse_forward == "auto"
    assert load_config(None, ["training.sparse_forward=true"]).training.sparse_forward is True
    with pytest.raises(ValueError, match=r"training\.sparse_forward"):
        load_config(None, ["training.sparse_forward=2:4"])


def test_a_residual_needs_codes_and_shares_in_order(file: Path) -> None:
    config = load_config(file, ["recipe.values=sign", "recipe.pattern=3:4", "schedule.residual=1"])
    assert config.schedule.residual_schedule() == ResidualSchedule(1.0, 0.1, 0.9)
    assert load_config(file, []).schedule.residual_schedule() is None
    with pytest.raises(ValueError, match=r"schedule\.residual=1\.0 needs quantised values"):
        load_config(file, ["recipe.values=full", "schedule.residual=1"])
    with pytest.raises(ValueError, match="not in order"):
        load_config(file, ["schedule.residual=1", "schedule.residual_warmup=0.9"])
