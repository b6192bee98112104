"""The files that a run writes about itself, and their JSON lines. Without torch, so that reading a run is quick."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sparse_bitnet.checkpoint.directory import write_text

CONFIG_FILE, ENVIRONMENT_FILE = "config.yaml", "env.json"
METRICS_FILE = (
    "metrics.jsonl"  # a line a log event: loss, learning rate, readings of the layers; or the validation loss
)
HISTOGRAMS_FILE = "histograms.jsonl"  # a line at each moment of `is_histogram_due`
MODEL, TOKENS = "model", "tokens"  # directories, beside the checkpoints

HISTOGRAM_REACH = 3.0  # from -3 to 3 times the scale; the outermost bins hold all beyond
HISTOGRAM_BINS = 96  # of 1/16: where weights round to another code, at +-0.5, one bin ends and the next begins
HISTOGRAM_MOMENTS = 16  # in a run, and one before its first step: a file of bounded size


def is_histogram_due(step: int, steps: int) -> bool:
    """Whether `step` of `steps` is the first past another sixteenth of the run; the last one is."""
    return step * HISTOGRAM_MOMENTS // steps > (step - 1) * HISTOGRAM_MOMENTS // steps


def append_line(file: Path, step: int, values: dict[str, Any]) -> None:
    """Add a line with `step`, the `time` (seconds, Unix) and `values`."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")


def drop_steps_after(file: Path, step: int) -> None:
    """Keep the lines up to `step`: what came after the checkpoint is about to be done again."""
    if file.exists():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(file, "".join(kept))
