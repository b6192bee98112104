"""The examples of fine-tuning, run as a user runs them, on a small model; what they write runs in llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from interop.llama_cpp import llama_cpp, log_probabilities, needs_llama
from sparse_bitnet import PackedLinear, convert
from sparse_bitnet.interop.peft import with_packed_layers
from sparse_bitnet.report.runs import read_run

# PEFT asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "user: the cat sat\nassistant:"


@pytest.fixture
def model(latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path):
    tokenizer.save_pretrained(tmp_path / "latent")
    tokenizer.save_pretrained(tmp_path / "packed")
    latent_model().save_pretrained(tmp_path / "latent")
    convert(latent_model()).save_pretrained(tmp_path / "packed")
    return tmp_path


@pytest.fixture
def chats(documents: list[str], tmp_path: Path) -> Path:
    file = tmp_path / "chats.jsonl"
    turns = [text.split(". ") for text in documents[:80]]
    lines = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}]}
        for one, other, *_ in turns
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(example: str, *arguments: Path) -> str:
    command = [sys.executable, str(EXAMPLES / example), *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


@needs_llama
def test_trl_trains_a_latent_checkpoint(
    model: Path, chats: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    output = tmp_path / "finetuned"
    assert "held out: loss" in run("finetune_trl.py", model / "latent", output, chats)
    history = read_run(output, "finetuned")
    assert history.events[-1].loss < history.events[0].loss - 0.5
    assert history.validations[-1].eval_loss < history.validations[0].eval_loss
    assert len(history.moments) == 17
    packed = AutoModelForCausalLM.from_pretrained(output / "packed")
    latent = AutoModelForCausalLM.from_pretrained(output / "latent")
    codes = {name: layer.codes() for name, layer in packed.named_modules() if isinstance(layer, PackedLinear)}
    assert len(codes) == 14
    assert all(torch.equal(latent.get_submodule(name).quantize_weight()[0], code) for name, code in codes.items())
    ids = tokenizer(PROMPT)["input_ids"]
    with llama_cpp(output / "model.gguf") as ask:
        assert ask(PROMPT)["id"] == int(log_probabilities(packed, ids).argmax())


@needs_llama
def test_lora_trains_over_a_packed_base(
    model: Path, chats: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    output = tmp_path / "finetuned"
    told = run("finetune_lora.py", model / "packed", output, chats).splitlines()
    losses = {line[:26].strip(): float(line[26:].split()[0]) for line in told if line.endswith("held out")}
    assert losses["base + adapter"] < losses["base"] - 0.5
    assert losses["merged, 16 bits a weight"] == pytest.approx(losses["base + adapter"], abs=0.05)
    assert losses["merged, ternary again"] > losses["base + adapter"]
    config = with_packed_layers(LoraConfig.from_pretrained(output / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(model / "packed")
    adapted = PeftModel.from_pretrained(base, output / "adapter", config=config)
    expected = log_probabilities(adapted, tokenizer(PROMPT)["input_ids"])
    with llama_cpp(output / "base.gguf", output / "adapter.gguf") as ask:
        step = ask(PROMPT)
    assert max(abs(one["logprob"] - float(expected[one["id"]])) for one in step["top_logprobs"]) < 0.1
