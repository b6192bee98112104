"""The files of a run, read as far as they are whole: a killed run has a broken last line, a new one has no line yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from sparse_bitnet.checkpoint.directory import read_json
from sparse_bitnet.training.run_log import CONFIG_FILE, ENVIRONMENT_FILE, HISTOGRAM_BINS, HISTOGRAMS_FILE, METRICS_FILE


class Line(BaseModel):
    """`time` in seconds, Unix; runs of before it was written have none."""

    step: int
    time: float | None = None


class LayerZeros(BaseModel):
    zeros: float


class LogEvent(Line):
    """Means over the steps since the last one, and readings of all layers (see training/monitors.py)."""

    loss: float
    learning_rate: float | None = None
    pattern: str | None = None
    flip_rate: float | None = None
    zeros: float | None = None
    zeros_natural: float | None = None
    polarisation: float | None = None
    layers: dict[str, LayerZeros] = {}


class Validation(Line):
    eval_loss: float


Counts = Annotated[list[int], Field(min_length=HISTOGRAM_BINS, max_length=HISTOGRAM_BINS)]


class LayerHistograms(BaseModel):
    kept: Counts
    masked: Counts


class Moment(Line):
    """Histograms of the latent weights / scale by layer, once `step` is done."""

    pattern: str
    values: str
    layers: dict[str, LayerHistograms]


@dataclass(frozen=True)
class Run:
    """`remarks`: what is missing or broken, a sentence each."""

    name: str
    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    events: list[LogEvent]
    validations: list[Validation]
    moments: list[Moment]
    remarks: list[str]

    @property
    def steps_planned(self) -> int | None:
        return (self.config.get("training") or {}).get("steps")

    @property
    def tokens_per_step(self) -> int | None:
        return self.environment.get("tokens_per_step")


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in these directories; ValueError for one that is none, is given twice, or if none has logged anything.

    A run is called by the end of its path, as much of it as tells it from the others.
    """
    whole = [directory.resolve() for directory in directories]
    for directory, path in zip(directories, whole, strict=True):
        if whole.count(path) > 1:
            raise ValueError(f"{directory} is given twice: name each run once")
    runs = [read_run(path, name) for path, name in zip(whole, _short_names(whole), strict=True)]
    if not any(run.events for run in runs):
        raise ValueError(f"{runs[0].directory}: nothing is logged yet: wait for training.log_every steps")
    return runs


def read_run(directory: Path, name: str) -> Run:
    """The run in `directory`; ValueError where that is none."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: give the output_dir of a `sparse-bitnet train`")
    if not (directory / METRICS_FILE).exists() and not (directory / CONFIG_FILE).exists():
        raise ValueError(
            f"{directory} holds no {METRICS_FILE} and no {CONFIG_FILE}: give the output_dir of a `sparse-bitnet train`"
        )
    remarks: list[str] = []
    lines = _read_lines(directory / METRICS_FILE, (LogEvent, Validation), remarks)
    moments = _read_lines(directory / HISTOGRAMS_FILE, (Moment,), remarks)
    events = [line for line in lines if isinstance(line, LogEvent)]
    if not events:
        remarks.append("nothing is logged yet")
    elif not moments:
        remarks.append(f"no {HISTOGRAMS_FILE}, hence no histograms: an older version trained it, or another program")
    return Run(
        name=name,
        directory=directory,
        config=_read_config(directory / CONFIG_FILE, remarks),
        environment=_read_environment(directory / ENVIRONMENT_FILE, remarks),
        events=events,
        validations=[line for line in lines if isinstance(line, Validation)],
        moments=[line for line in moments if isinstance(line, Moment)],
        remarks=remarks,
    )


def _short_names(paths: list[Path]) -> list[str]:
    """The last part of each path, or as many of the last as make it the only one."""
    names = []
    for path in paths:
        lengths = range(1, len(path.parts) + 1)
        tails = (path.parts[-length:] for length in lengths)
        names.append("/".join(next(tail for tail in tails if _endings(paths, tail) == 1)))
    return names


def _endings(paths: list[Path], tail: tuple[str, ...]) -> int:
    return sum(path.parts[-len(tail) :] == tail for path in paths)


AnyLine = TypeVar("AnyLine", bound=Line)


def _read_lines(file: Path, kinds: tuple[type[AnyLine], ...], remarks: list[str]) -> list[AnyLine]:
    """The lines of `file`, each of the first kind that it fits; a remark for those that fit none."""
    if not file.exists():
        return []
    found, broken = [], []
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        line = _parse(text, kinds)
        if line is None:
            broken.append(number)
        else:
            found.append(line)
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        remarks.append(f"{file.name}: line {broken[0]}{others} cannot be read and is left out")
    return sorted(found, key=lambda line: line.step)


def _parse(text: str, kinds: tuple[type[AnyLine], ...]) -> AnyLine | None:
    for kind in kinds:
        try:
            return kind.model_validate_json(text)
        except ValidationError:
            continue
    return None


def _read_config(file: Path, remarks: list[str]) -> dict[str, Any]:
    """The settings as they stand: those of another version may have other names."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remarks.append(f"no {file.name}, hence no settings")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        remarks.append(f"{file.name} cannot be read, hence no settings")
        return {}
    return config


def _read_environment(file: Path, remarks: list[str]) -> dict[str, Any]:
    try:
        return read_json(file)
    except ValueError:
        remarks.append(f"no readable {file.name}, hence no tokens a second, versions and hardware")
        return {}
