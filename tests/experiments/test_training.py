"""Runs: the library's layers trained by the loop, the same for the same seed, and a result that tells all of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from experiments.corpus import Corpus
from experiments.readings import latent_histogram
from experiments.results import Results
from experiments.settings import Run, Scale, full_precision, sign, ternary, turning_sparse
from experiments.training import Training, batches, build_model, head_loss, learning_rate, train
from sparse_bitnet import Recipe
from sparse_bitnet.nn.stored_settings import named_layers

CPU = torch.device("cpu")


def longer(run: Run, steps: int) -> Run:
    return replace(run, tokens=steps * run.batch * run.sequence)


def test_the_dense_baseline_is_a_model_of_linear_layers_bit_for_bit(micro: Scale, corpus: Corpus) -> None:
    run = full_precision(micro, "toy", "8:8", 0, 8e-3)
    ours = build_model(run, CPU)
    torch.manual_seed(run.seed)
    config = ours.config.to_dict()
    config.pop("quantization_config")
    plain = AutoModelForCausalLM.from_config(type(ours.config)(**config), dtype=torch.float32).train()
    assert not list(named_layers(plain))
    first, second = Training(run, ours, corpus.ids["train"]), Training(run, plain, corpus.ids["train"])
    for step, batch in zip(range(3), batches(first.blocks, run.batch, run.seed), strict=False):
        assert torch.equal(first.step(step, batch), second.step(step, batch))
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_masked_baseline_is_not(micro: Scale, corpus: Corpus) -> None:
    losses = [
        train(full_precision(micro, "toy", pattern, 0, 8e-3), corpus, CPU)["loss"][-1][1] for pattern in ("8:8", "2:8")
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("make", [full_precision, ternary, sign])
def test_a_run_is_the_same_again_and_another_seed_is_not(micro: Scale, corpus: Corpus, make: object) -> None:
    first, again, other = (
        train(make(micro, "toy", "6:8", seed, 8e-3), corpus, CPU)  # type: ignore[operator]
        for seed in (0, 0, 1)
    )
    assert (first["loss"], first["perplexity"]) == (again["loss"], again["perplexity"])
    assert first["perplexity"] != other["perplexity"]


def test_a_result_tells_all_and_reads_back(micro: Scale, corpus: Corpus, tmp_path: object) -> None:
    run = replace(ternary(micro, "toy", "6:8", 0, 8e-3), zero_shot=True)
    results = Results(tmp_path)  # type: ignore[arg-type]
    file = results.add(run, train(run, corpus, CPU))
    result = Results(tmp_path).of(run)  # type: ignore[arg-type]
    assert result == json.loads(file.read_text())
    assert {"command", "commit", "versions", "seed", "gpus", "settings", "seconds", "tokens_per_second"} <= set(result)
    assert result["settings"]["recipe"] == run.recipe.to_dict()
    assert [reading["step"] for reading in result["readings"]] == list(range(1, run.steps + 1))
    assert all(0 <= reading["flip_rate"] <= 1 for reading in result["readings"])
    assert set(result["layers"]) == {name for name, _ in named_layers(build_model(run, CPU))}
    assert all(layer["zeros"] >= 0.25 for layer in result["layers"].values())  # 6:8
    assert result["zero_shot"]["blimp"]["questions"] == result["zero_shot"]["hellaswag"]["questions"] == 2
    assert sum(result["histogram"]["counts"]) == run.shape.weights
    assert results.perplexity(run) == result["perplexity"]["test"]


def test_training_learns(micro: Scale, corpus: Corpus) -> None:
    result = train(longer(ternary(micro, "toy", "6:8", 0, 8e-3), 60), corpus, CPU)
    assert result["loss"][0][1] > 6 > 4 > result["loss"][-1][1]
    assert result["perplexity"]["valid"] == pytest.approx(math.exp(result["loss"][-1][1]), rel=0.3)


def test_divergence_is_a_result(micro: Scale, corpus: Corpus, tmp_path: object) -> None:
    run = longer(full_precision(micro, "toy", "8:8", 0, math.inf), 5)
    results = Results(tmp_path)  # type: ignore[arg-type]
    results.add(run, train(run, corpus, CPU))
    found = Results(tmp_path).of(run)  # type: ignore[arg-type]
    assert found is not None and found["diverged_at"] is not None and "perplexity" not in found
    assert results.perplexity(run) == math.inf


def test_a_corpus_too_small_for_a_step_is_told(micro: Scale, corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="do not fill a step of 1000000"):
        train(ternary(replace(micro, batch=10**6), "toy", "6:8", 0, 8e-3), corpus, CPU)


def test_pattern_decay_and_residual_follow_their_schedules(micro: Scale, corpus: Corpus) -> None:
    turning = longer(turning_sparse(micro, "toy", "6:8", 0, 8e-3, 0.5), 10)
    model = build_model(turning, CPU)
    training = Training(turning, model, corpus.ids["train"])
    seen = []
    for step in range(10):
        training._prepare_step(step)
        layer = next(layer for _, layer in named_layers(model))
        decay = [group["weight_decay"] for group in training.optimizer.param_groups]
        seen.append((str(layer.recipe.pattern), round(decay[0], 3), decay[1]))
    assert [pattern for pattern, _, _ in seen] == ["8:8"] * 5 + ["6:8"] * 5
    assert [decay for _, decay, _ in seen] == [0.1, 0.08, 0.06, 0.04, 0.02] + [0] * 5
    assert {other for _, _, other in seen} == {0}  # norms and biases
    sherry = longer(sign(micro, "toy", "3:4", 0, 8e-3, residual=1.0), 20)
    model = build_model(sherry, CPU)
    training = Training(sherry, model, corpus.ids["train"])
    shares = []
    for step in (0, 2, 17, 18):
        training._prepare_step(step)
        residual = next(layer for _, layer in named_layers(model)).residual  # type: ignore[union-attr]
        shares.append(0.0 if residual is None else float(residual))
    assert shares[:2] == [0.5, 1.0] and shares[2] > shares[3] == 0


def test_the_learning_rate_rises_and_falls_to_its_share(micro: Scale) -> None:
    run = replace(longer(ternary(micro, "toy", "6:8", 0, 1.0), 100), warmup_steps=10)
    rates = [learning_rate(run, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx((1 + 1 / 30) / 2)
    assert rates[100] == pytest.approx(1 / 30)


def test_every_sequence_is_seen_once_an_epoch_in_an_order_of_the_seed() -> None:
    blocks = torch.arange(20).view(10, 2)
    epochs = [row for _, batch in zip(range(4), batches(blocks, 5, 0), strict=False) for row in batch[:, 0].tolist()]
    assert sorted(epochs[:10]) == sorted(epochs[10:]) == list(range(0, 20, 2))
    assert epochs[:10] != epochs[10:]
    assert (
        next(batches(blocks, 5, 0)).tolist()
        == next(batches(blocks, 5, 0)).tolist()
        != next(batches(blocks, 5, 1)).tolist()
    )


def test_the_loss_is_the_models_own(micro: Scale, corpus: Corpus) -> None:
    model: PreTrainedModel = build_model(ternary(micro, "toy", "6:8", 0, 1.0), CPU).eval()
    ids = corpus.ids["valid"][:64].long().view(2, 32)
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(head_loss(hidden, model.lm_head.weight, ids), expected)


def test_the_threshold_of_the_histogram_parts_what_is_kept() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[8.0, -7, 6, 5, -4, 3, 2, -1]]))
    from sparse_bitnet import prepare

    histogram = latent_histogram(prepare(model, Recipe("6:8", activations="none")))
    assert histogram["threshold"] == pytest.approx([2.5 / 4.5] * 3)
    width = (histogram["to"] - histogram["from"]) / len(histogram["counts"])
    places = [
        histogram["from"] + width * (i + 0.5) for i, count in enumerate(histogram["counts"]) for _ in range(count)
    ]
    assert places == pytest.approx(sorted(w / 4.5 for w in (8, -7, 6, 5, -4, 3, 2, -1)), abs=width)
    assert latent_histogram(prepare(torch.nn.Sequential(torch.nn.Linear(8, 1)), Recipe("8:8")))["threshold"] is None


WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.__dict__["find_spec"].__func__
missing = {"pydantic", "datasets", "pyarrow", "zstandard", "lm_eval", "scipy", "matplotlib", "pandas", "sklearn"}
def without(cls, name, *rest):
    return None if name.partition(".")[0] in missing else find(cls, name, *rest)
PathFinder.find_spec = classmethod(without)
import experiments.execute, experiments.training
print(sorted(missing & set(sys.modules)))
"""


def test_a_run_needs_no_package_that_its_machine_may_lack() -> None:
    answer = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=False)
    assert (answer.stdout.strip(), answer.returncode) == ("[]", 0), answer.stderr
