"""The settings of a training run: strict, and the only place where their defaults stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparse_bitnet.corpus.documents import TextSource
from sparse_bitnet.recipe import Activations, Gradient, MaskFrom, NMPattern, Order, Recipe, Values
from sparse_bitnet.training.schedules import (
    PatternSchedule,
    ResidualSchedule,
    dense_to_sparse,
    gradual,
    sparse_from_start,
)

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSettings(Settings):
    """`source`: a preset, a directory or a Hub id; `weights`: `random` starts anew from the shape alone."""

    source: str = "tiny"
    weights: Literal["pretrained", "random"] = "pretrained"


class RecipeSettings(Settings):
    pattern: str = "6:8"
    values: Values = "ternary"
    activations: Activations = "int8"
    order: Order = "quant-then-mask"
    mask_from: MaskFrom = "latent"
    gradient: Gradient = "dense"
    targets: list[str] | None = None
    ignore: list[str] = ["lm_head"]
    indivisible: Literal["raise", "skip"] = "raise"

    def recipe(self) -> Recipe:
        return Recipe.from_dict(self.model_dump(exclude={"targets", "ignore", "indivisible"}))

    @model_validator(mode="after")
    def _check(self) -> RecipeSettings:
        self.recipe()
        return self


class ScheduleSettings(Settings):
    """sparse: the pattern throughout; dense-to-sparse: from the share `at`; gradual: `patterns`, the last from `at`.

    `residual` is the peak of a `ResidualSchedule`, 0 for none.
    """

    kind: Literal["sparse", "dense-to-sparse", "gradual"] = "sparse"
    at: Share = 0.5
    patterns: list[str] = []
    residual: Annotated[float, Field(ge=0)] = 0.0
    residual_warmup: Share = 0.1
    residual_until: Annotated[float, Field(gt=0, le=1)] = 0.9

    def residual_schedule(self) -> ResidualSchedule | None:
        return ResidualSchedule(self.residual, self.residual_warmup, self.residual_until) if self.residual else None

    def schedule(self, pattern: NMPattern) -> PatternSchedule:
        if self.kind == "gradual":
            stages = [NMPattern.parse(text) for text in self.patterns]
            if not stages or stages[-1] != pattern:
                raise ValueError(f"schedule.patterns must end with recipe.pattern, {pattern}")
            return gradual(stages, self.at)
        if self.patterns:
            raise ValueError("schedule.patterns is only used by kind: gradual")
        return dense_to_sparse(pattern, self.at) if self.kind == "dense-to-sparse" else sparse_from_start(pattern)


class TokenizerSettings(Settings):
    """`source`: `train`, a directory, a tokenizer.json or a Hub id; null: the model's own, or `train` for a preset."""

    source: str | None = None
    vocab_size: Count = 8192
    sample_bytes: Count = 50_000_000


class DataSettings(Settings):
    files: list[str] = []
    dataset: str | None = None
    split: str = "train"
    text_field: str = "text"
    streaming: bool = False
    validation_files: list[str] = []

    def source(self) -> TextSource:
        return TextSource(tuple(self.files), self.dataset, self.split, self.text_field)


class TrainingSettings(Settings):
    """The defaults are the authors' (arXiv 2603.05168); `weight_decay_until` applies to quantised weights only."""

    steps: Count = 1000
    block_size: Annotated[int, Field(gt=1)] = 2048
    batch_size: Count = 8
    gradient_accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-4
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 1 / 30
    warmup_steps: Annotated[int, Field(ge=0)] = 1000
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    weight_decay_until: Annotated[float, Field(gt=0, le=1)] | None = 0.5
    clip: Annotated[float, Field(gt=0)] = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    sharding: Literal["none", "fsdp2"] = "none"
    compile: bool = False
    fused_loss: Literal["auto"] | bool = "auto"
    sparse_forward: Literal["auto"] | bool = "auto"
    gradient_checkpointing: bool = False
    log_every: Count = 10
    save_every: Count = 100
    eval_every: Count = 100
    eval_blocks: Count = 200
    keep_checkpoints: Count = 2
    report_to: list[str] = []
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class TrainConfig(Settings):
    """One run. ValueError (pydantic's) names a field that is unknown, of the wrong type or out of range."""

    output_dir: str = "runs/sparse-bitnet"
    model: ModelSettings = ModelSettings()
    recipe: RecipeSettings = RecipeSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    data: DataSettings = DataSettings()
    training: TrainingSettings = TrainingSettings()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        self.pattern_schedule()
        if self.schedule.residual_schedule() is not None and self.recipe.values == "full":
            raise ValueError(
                f"schedule.residual={self.schedule.residual} needs quantised values: recipe.values is full"
            )
        return self

    def pattern_schedule(self) -> PatternSchedule:
        return self.schedule.schedule(NMPattern.parse(self.recipe.pattern))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class YamlLoader(yaml.SafeLoader):
    """YAML 1.2 scalars: in YAML 1.1, which PyYAML reads, 6:8 is the number 368 and 1e-3 a string."""


YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in resolvers if not tag.endswith((":int", ":float"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+(?:_[0-9]+)*$"), list("-+0123456789"))
YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$"),
    list("-+0123456789."),
)


def load_config(file: Path | None, overrides: list[str]) -> TrainConfig:
    """The settings in a YAML file, if any, with `section.field=value` overrides on top.

    ValueError, in one line that names the field and the remedy, for whatever does not fit.
    """
    settings = {} if file is None else _read_yaml(file)
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not of the form section.field=value")
        _set(settings, name.split("."), _parse_yaml(value, override))
    try:
        return TrainConfig.model_validate(settings)
    except ValidationError as error:
        raise ValueError(_in_one_line(error)) from error


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{file}: no such file; `sparse-bitnet init {file}` writes one") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text") from error
    settings = _parse_yaml(text, str(file))
    if settings is not None and not isinstance(settings, dict):
        raise ValueError(f"{file} holds no settings of the form `section:`")
    return settings or {}


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, YamlLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {' '.join(str(error).split())}") from error


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    for section in path[:-1]:
        if not isinstance(settings.setdefault(section, {}), dict):
            raise ValueError(f"{'.'.join(path)}: {section} is not a section")
        settings = settings[section]
    settings[path[-1]] = value


def _in_one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{name}: unknown setting; `sparse-bitnet init` writes a file with all of them"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], BaseModel | dict) else f" (got {first['input']!r})"
    return f"{name}: {message}{given}" if name else message
