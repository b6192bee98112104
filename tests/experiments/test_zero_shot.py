"""The lean scorer against lm-evaluation-harness, on the same questions, item for item by their accuracies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.corpus import END_OF_TEXT, Corpus, Item
from experiments.settings import Scale, full_precision, ternary
from experiments.training import build_model
from experiments.zero_shot import _log_likelihoods, answer_tasks


@pytest.mark.parametrize("seed", range(2))
def test_accuracies_are_those_of_the_harness(
    micro: Scale, corpus: Corpus, corpus_directory: Path, task_files: Path, seed: int
) -> None:
    from transformers import PreTrainedTokenizerFast

    from sparse_bitnet.evaluation.tasks import evaluate_tasks

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(corpus_directory / "tokenizer.json"), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    assert tokenizer.eos_token_id == END_OF_TEXT
    model = build_model(ternary(micro, "toy", "6:8", seed, 1.0), torch.device("cpu")).eval()
    found = answer_tasks(model, corpus.tasks)
    theirs = evaluate_tasks(model, tokenizer, [str(task_files)]).harness["results"]
    names = {name.rpartition("/")[2]: result for name, result in theirs.items()}
    pairs, choices = names["pairs"], names["choices"]
    assert found["blimp/word_order"].sum == found["blimp"].sum == pairs["acc,none"]
    assert found["hellaswag"].sum == choices["acc,none"]
    assert found["hellaswag"].by_character == choices["acc_norm,none"]


@torch.no_grad()
def test_log_likelihoods_are_those_of_each_text_alone(micro: Scale, corpus: Corpus) -> None:
    """Without int8 activations, where a sum in another order can end on the other side of a rounding."""
    model = build_model(full_precision(micro, "toy", "6:8", 0, 1.0), torch.device("cpu")).eval()
    items = [item for items in corpus.tasks.values() for item in items]
    found = iter(_log_likelihoods(model, items))
    for item in items:
        for ids in item.continuations:
            whole = torch.tensor([item.context + ids])
            scores = model(input_ids=whole).logits[0, :-1].log_softmax(-1)
            alone = scores.gather(-1, whole[0, 1:, None])[-len(ids) :].sum()
            assert next(found) == pytest.approx(float(alone), abs=1e-4)


def test_a_context_is_not_scored(micro: Scale) -> None:
    model = build_model(ternary(micro, "toy", "6:8", 0, 1.0), torch.device("cpu")).eval()
    one, other = (_log_likelihoods(model, [Item(context, [[7]], [1], 0)])[0] for context in ([5, 6], [6]))
    assert -10 < one < 0 and -10 < other < 0  # one token of 512, each
