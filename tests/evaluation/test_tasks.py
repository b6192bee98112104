"""Tasks through lm-evaluation-harness: known answers, the same for latent and packed, and clear refusals."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typer.testing import CliRunner

from sparse_bitnet import convert
from sparse_bitnet.cli.main import app
from sparse_bitnet.evaluation.tasks import evaluate_tasks


def write(file: Path, rows: list[dict[str, object]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


QUESTIONS = [
    {"query": f"the {animal} sat on", "choices": ["a mat", "the dog ran fast", "old"], "gold": index % 3, "note": None}
    for index, animal in enumerate(["cat", "dog", "barn", "rain", "hills", "red cat"])
]
PAIRS = [{"sentence_good": f"the {noun} ran", "sentence_bad": f"ran {noun} the", "UID": "x"} for noun in ("cat", "dog")]


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, rest: str) -> float:
    before, ids = tokenizer(context)["input_ids"], tokenizer(context + rest)["input_ids"]
    before, ids = (before, ids) if before else ([tokenizer.eos_token_id], [tokenizer.eos_token_id, *ids])
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probabilities[at - 1, ids[at]]) for at in range(len(before), len(ids)))


def test_accuracies_are_those_of_the_log_likelihoods(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = latent_model().eval()
    write(tmp_path / "choice.jsonl.gz", QUESTIONS)
    write(tmp_path / "pairs" / "order.jsonl", PAIRS)
    write(tmp_path / "pairs" / "again.jsonl", PAIRS[:1])
    tasks = [str(tmp_path / "choice.jsonl.gz"), str(tmp_path / "pairs")]
    found = evaluate_tasks(model, tokenizer, tasks)
    right = []
    for row in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, str(row["query"]), f" {one}") for one in row["choices"]]  # type: ignore
        right.append(scores.index(max(scores)) == row["gold"])
    results = found.harness["results"]
    assert results["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    pairs = []
    for row in PAIRS:
        good, bad = (log_likelihood(model, tokenizer, "", row[f"sentence_{kind}"]) for kind in ("good", "bad"))
        pairs.append(good > bad)
    assert results["pairs/order"]["acc,none"] == pytest.approx(sum(pairs) / 2)
    assert found.means["pairs"] == pytest.approx((sum(pairs) / 2 + pairs[0]) / 2)
    assert "mean of pairs: acc" in str(found) and "|choice" in str(found)
    packed = evaluate_tasks(convert(model), tokenizer, tasks)
    assert packed.to_dict()["results"] == found.to_dict()["results"]


def test_every_file_is_a_task_of_its_own(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    files = ("arc.easy.jsonl", "arc.challenge.jsonl.gz", "more/arc.easy.jsonl", "more/old/arc.easy.jsonl")
    for count, file in enumerate(files, 1):
        write(tmp_path / "all" / file, QUESTIONS[:count])
    found = evaluate_tasks(latent_model(), tokenizer, [str(tmp_path / "all"), str(tmp_path / "all" / files[0])])
    counts = {name: samples["original"] for name, samples in found.harness["n-samples"].items()}
    assert counts == {
        "all/arc.easy": 1, "all/arc.challenge": 2, "all/more/arc.easy": 3, "all/more/old/arc.easy": 4, "arc.easy": 1,
    }  # fmt: skip
    accuracies = [found.harness["results"][name]["acc,none"] for name in counts if name.startswith("all/")]
    assert found.means == {"all": pytest.approx(sum(accuracies) / 4)}


def test_a_directory_is_named_however_it_is_given(
    latent_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "pairs" / "order.jsonl", PAIRS)
    monkeypatch.chdir(tmp_path / "pairs")
    found = evaluate_tasks(latent_model(), tokenizer, ["."])
    assert list(found.harness["n-samples"]) == ["pairs/order"] and list(found.means) == ["pairs"]


@pytest.mark.parametrize(
    ("files", "tasks", "name"),
    [
        (["a.jsonl", "a.jsonl.gz"], ["a.jsonl", "a.jsonl.gz"], "a"),
        (["one/a.jsonl", "two/a.jsonl"], ["one/a.jsonl", "two/a.jsonl"], "a"),
        (["all/a.jsonl", "all/a.jsonl.gz"], ["all"], "all/a"),
        (["one/all/a.jsonl", "two/all/b.jsonl"], ["one/all", "two/all"], "all/"),
    ],
)
def test_two_tasks_of_one_name_are_refused(
    latent_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    files: list[str],
    tasks: list[str],
    name: str,
) -> None:
    for file in files:
        write(tmp_path / file, PAIRS)
    with pytest.raises(ValueError, match=f"are both named {name}: rename one, or leave it out"):
        evaluate_tasks(latent_model(), tokenizer, [str(tmp_path / task) for task in tasks])


def test_a_file_with_the_name_of_a_task_of_the_harness_is_refused_beside_it(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path / "hellaswag.jsonl", QUESTIONS)
    with pytest.raises(ValueError, match=r"hellaswag.jsonl has the name of the harness's task hellaswag: rename it"):
        evaluate_tasks(latent_model(), tokenizer, ["hellaswag", str(tmp_path / "hellaswag.jsonl")])


def test_the_command_writes_what_it_prints(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    convert(latent_model()).save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    write(tmp_path / "choice.jsonl", QUESTIONS)
    command = ["eval", "tasks", str(tmp_path / "packed"), "--tasks", str(tmp_path / "choice.jsonl"), "--limit", "3"]
    answer = CliRunner().invoke(app, [*command, "--json", str(tmp_path / "found.json"), "--device", "cpu"])
    assert answer.exit_code == 0, answer.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["n-samples"]["choice"] == {"original": 6, "effective": 3}
    assert {"commit", "versions", "limit"} <= set(found)
    assert "choice" in answer.output


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty: it holds no questions"),
        ([{**QUESTIONS[0], "gold": 7}], r"line 1: gold is 7, and is to be one of 0 to 2"),
        ([QUESTIONS[0], {**QUESTIONS[0], "choices": None}], r"line 2: it has no choices"),
    ],
)
def test_a_question_that_cannot_be_asked_is_told(
    latent_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    rows: list[dict[str, object]],
    message: str,
) -> None:
    write(tmp_path / "wrong.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        evaluate_tasks(latent_model(), tokenizer, [str(tmp_path / "wrong.jsonl")])


def test_what_is_no_task_is_refused(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    write(tmp_path / "other.jsonl", [{"text": "a"}])
    (tmp_path / "damaged.jsonl").write_text("{")
    (tmp_path / "empty").mkdir()
    cases = {
        "other.jsonl": "is no task: its lines are to have query, choices, gold or sentence_good, sentence_bad",
        "damaged.jsonl": "cannot be read",
        "empty": "holds no .jsonl files",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            evaluate_tasks(latent_model(), tokenizer, [str(tmp_path / name)])
    with pytest.raises(ValueError, match="no such file, and the harness has no task of this name"):
        evaluate_tasks(latent_model(), tokenizer, ["no-such-task"])


def test_real_questions(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, shared_data: Path
) -> None:
    file = shared_data / "eval" / "hellaswag_val.mc.jsonl.xz"
    found = evaluate_tasks(latent_model(), tokenizer, [str(file)], limit=8)
    assert found.harness["n-samples"]["hellaswag_val.mc"] == {"original": 10042, "effective": 8}
