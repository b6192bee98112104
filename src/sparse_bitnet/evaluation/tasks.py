"""Zero-shot tasks by lm-evaluation-harness: questions in local files, or the harness's own tasks by name.

Two kinds of file, a JSON object a line, also as .xz, .gz or .zst: multiple choice with `query`, `choices` and `gold`,
the number of the right one; and minimal pairs with `sentence_good` and `sentence_bad`, as in BLiMP. A directory holds
many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_bitnet.corpus.documents import COMPRESSIONS, DAMAGE

KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    },
    ("sentence_good", "sentence_bad"): {
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "target_delimiter": "",
    },
}
"""The columns of a kind of file -> how the harness reads it."""
METRICS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True)
class TaskResults:
    """`harness` is what the harness returned; `means` the mean accuracy of each directory's files, of equal weight."""

    harness: dict[str, Any]
    means: Mapping[str, float]

    def __str__(self) -> str:
        means = "".join(f"\nmean of {name}: acc {mean:.4f}" for name, mean in self.means.items())
        return make_table(self.harness) + means

    def to_dict(self) -> dict[str, Any]:
        kept = ("results", "n-samples", "n-shot", "higher_is_better")
        return {**{key: self.harness[key] for key in kept if key in self.harness}, "means": dict(self.means)}


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = 8,
) -> TaskResults:
    """Accuracy on each of `tasks`, zero-shot: files, directories of files, or names that the harness knows.

    limit  questions a task, the first ones; None takes all

    A file is named as it is, less `.jsonl` and `.xz`, `.gz` or `.zst`; in a directory, by its path from there.
    ValueError for a name that is neither, two of the same name, or a file that is of no kind that is known.
    """
    chosen: list[Any] = []
    groups: dict[str, list[str]] = {}
    sources: dict[str, Path] = {}  # what has a name already; that of a directory ends in /
    for entry in tasks:
        path = Path(entry).expanduser()
        if not path.exists():
            chosen.append(entry)
            continue
        files = sorted(path.rglob("*.jsonl*")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds no .jsonl files")
        members = {file: _task_name(file, path) for file in files}
        if path.is_dir():
            group = path.absolute().name
            _take_name(sources, f"{group}/", path)
            groups[group] = list(members.values())
        for file, name in members.items():
            _take_name(sources, name, file)
        chosen += [_task(file, name) for file, name in members.items()]
    names = [entry for entry in chosen if isinstance(entry, str)]
    taken = [name for name in names if name in sources]
    if taken:
        raise ValueError(f"--tasks: {sources[taken[0]]} has the name of the harness's task {taken[0]}: rename it")
    manager = TaskManager(include_defaults=bool(names))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise ValueError(f"--tasks {unknown[0]}: no such file, and the harness has no task of this name")
    harness: Any = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),  # type: ignore[arg-type]
        tasks=chosen, limit=limit, task_manager=manager, log_samples=False,
    )  # fmt: skip
    assert harness is not None  # it is None on other processes than the first alone
    means = {name: fmean(harness["results"][task]["acc,none"] for task in members) for name, members in groups.items()}
    return TaskResults(harness, means)


def _task_name(file: Path, entry: Path) -> str:
    """The path of `file` from beside `entry`, the file itself or a directory around it, less .jsonl and compression."""
    path = entry.absolute().name / file.relative_to(entry)
    return str(path.with_suffix("") if path.suffix in COMPRESSIONS else path).removesuffix(".jsonl")


def _take_name(sources: dict[str, Path], name: str, path: Path) -> None:
    if name in sources:
        raise ValueError(f"--tasks: {sources[name]} and {path} are both named {name}: rename one, or leave it out")
    sources[name] = path


def _task(file: Path, name: str) -> dict[str, Any]:
    """The harness's description of a task whose questions are in `file`."""
    if not file.stat().st_size:
        raise ValueError(f"{file} is empty: it holds no questions")
    try:
        questions = datasets.load_dataset("json", data_files=[str(file)], split="train", streaming=True)
        rows = list(questions)
    except DAMAGE as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    kind = next((columns for columns in KINDS if rows and set(columns) <= set(rows[0])), None)
    if kind is None:
        known = " or ".join(", ".join(columns) for columns in KINDS)
        raise ValueError(f"{file} is no task: its lines are to have {known}")
    for number, row in enumerate(rows, 1):
        wrong = next((column for column in kind if row.get(column) is None), None)
        if wrong is not None:
            raise ValueError(f"{file}, line {number}: it has no {wrong}")
        if "choices" in kind and row["gold"] not in range(len(row["choices"])):
            count = len(row["choices"])
            raise ValueError(f"{file}, line {number}: gold is {row['gold']!r}, and is to be one of 0 to {count - 1}")
    table = datasets.Dataset.from_list([{column: row[column] for column in kind} for row in rows])
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": table},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": METRICS,
        "metadata": {"version": 1},
        **KINDS[kind],
    }
