"""Conversations to fine-tune on: those of a file, or sums, so that the examples run with nothing at hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

# For a tokenizer that has none; it travels with the model, into the GGUF file too.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def conversations(file: str | None) -> tuple[Dataset, Dataset]:
    """For training and held out: `{"messages": [{"role": ..., "content": ...}, ...]}`, one a line of `file`."""
    lines = sums() if file is None else map(json.loads, Path(file).read_text(encoding="utf-8").splitlines())
    split = Dataset.from_list(list(lines)).train_test_split(test_size=0.1, seed=0)
    return split["train"], split["test"]


def sums() -> list[dict[str, list[dict[str, str]]]]:
    """The 400 sums of two numbers below 20, asked and answered."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {one} plus {other}?"},
                {"role": "assistant", "content": f"{one} plus {other} is {one + other}."},
            ]
        }
        for one in range(20)
        for other in range(20)
    ]


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, chats: Dataset) -> float:
    """Nats a token."""
    total, tokens = 0.0, 0
    for chat in chats:
        text = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids  # the template has its own
        logits = model.eval()(input_ids=ids.to(model.device)).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:].to(model.device), reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens
