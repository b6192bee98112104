"""LoRA over packed layers: its gradients, its files, and its adapter in llama.cpp beside the ternary base."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from interop.llama_cpp import llama_cpp, log_probabilities, needs_llama
from sparse_bitnet import PackedLinear, Recipe, convert, prepare
from sparse_bitnet.interop.gguf import export_gguf
from sparse_bitnet.interop.gguf_adapter import export_gguf_adapter
from sparse_bitnet.interop.peft import LoraPackedLinear, with_packed_layers

# PEFT asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def packed(
    latent_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[..., Path]:
    def make(recipe: Recipe | None = None) -> Path:
        convert(latent_model(recipe)).save_pretrained(tmp_path / "packed")
        tokenizer.save_pretrained(tmp_path / "packed")
        return tmp_path / "packed"

    return make


def lively(model: Any) -> Any:
    """An adapter as if trained, always the same: B begins at 0, with which it does nothing."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return model


def adapted(directory: Path, **settings: Any) -> Any:
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LAYERS} | settings))
    return lively(get_peft_model(AutoModelForCausalLM.from_pretrained(directory), with_packed_layers(config)))


def test_adapters_get_the_gradients_that_they_have_over_dense_layers(packed: Callable[..., Path]) -> None:
    """Through all the packed layers above them; with activations that are not rounded both are the same function."""
    directory = packed(Recipe("6:8", activations="none"))
    dense = AutoModelForCausalLM.from_pretrained(directory)
    dense.dequantize()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS)
    models = [adapted(directory), lively(get_peft_model(dense, config))]
    assert sum(isinstance(module, LoraPackedLinear) for module in models[0].modules()) == 14
    grads = []
    for model in models:
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 28
    for name, grad in grads[0].items():
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-6)


def test_only_the_adapter_trains_and_it_is_stored_alone(packed: Callable[..., Path], tmp_path: Path) -> None:
    directory = packed()
    model = adapted(directory)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path / "adapter")
    config = with_packed_layers(LoraConfig.from_pretrained(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(directory)
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    with torch.no_grad():
        assert torch.equal(opened(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_the_trainer_takes_a_packed_model_with_an_adapter_only(packed: Callable[..., Path], tmp_path: Path) -> None:
    directory = packed()
    settings = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized models"):
        Trainer(AutoModelForCausalLM.from_pretrained(directory), settings)
    Trainer(adapted(directory), settings)


def test_what_would_touch_the_packed_weight_is_refused(packed: Callable[..., Path]) -> None:
    directory = packed()
    model = adapted(directory)
    with pytest.raises(ValueError, match="cannot be merged into packed ternary weights"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="nsupported variant"):
        adapted(directory, use_dora=True)
    assert sum(isinstance(module, PackedLinear) for module in model.unload().modules()) == 14


SHAPE = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@needs_llama
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("rslora", [False, True])
def test_llama_cpp_adds_the_adapter_to_the_ternary_base(
    kind: str,
    rslora: bool,
    dense_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    tmp_path: Path,
) -> None:
    torch.manual_seed(1)
    if kind == "llama":
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, tie_word_embeddings=False), dtype=torch.float32)
    else:
        model = dense_model(**SHAPE)
    directory = tmp_path / "packed"
    convert(prepare(model, Recipe("6:8"))).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    model = adapted(directory, use_rslora=rslora).eval()
    model.save_pretrained(tmp_path / "adapter")
    export_gguf(str(directory), tmp_path / "base.gguf")
    size = export_gguf_adapter(tmp_path / "adapter", str(directory), tmp_path / "adapter.gguf")
    assert size == (tmp_path / "adapter.gguf").stat().st_size
    texts = ((text[:40], tokenizer(text[:40])["input_ids"]) for text in documents)
    answers = ((text, ids, log_probabilities(model, ids)) for text, ids in texts)
    prompt, ids, expected = next(  # it says nothing of a token that is no text, or that ends it
        answer for answer in answers if tokenizer.decode([int(answer[2].argmax())]).strip().isalpha()
    )
    with llama_cpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as ask:
        step = ask(prompt)
    apart = [abs(one["logprob"] - float(expected[one["id"]])) for one in step["top_logprobs"]]
    assert len(apart) == 10
    assert max(apart) < 0.05  # 8-bit activations, rounded by token here and by block there
    with model.disable_adapter():
        base = log_probabilities(model, ids)
    assert max(abs(one["logprob"] - float(base[one["id"]])) for one in step["top_logprobs"]) > 0.1


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of adapters on embeddings
def test_adapters_that_llama_cpp_has_no_word_for_are_refused(packed: Callable[..., Path], tmp_path: Path) -> None:
    directory, adapter = packed(), tmp_path / "adapter"
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors"):
        export_gguf_adapter(adapter, str(directory), tmp_path / "adapter.gguf")
    adapted(directory).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for other, message in (
        (config | {"rank_pattern": {"q_proj": 2}}, "uses rank_pattern, which llama.cpp's adapters do not have"),
        ({"peft_type": "IA3"}, "llama.cpp takes LoRA only"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=message):
            export_gguf_adapter(adapter, str(directory), tmp_path / "adapter.gguf")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter.gguf").write_text("mine")
    with pytest.raises(ValueError, match="exists: remove it"):
        export_gguf_adapter(adapter, str(directory), tmp_path / "adapter.gguf")
    adapted(directory, target_modules=["embed_tokens"]).save_pretrained(tmp_path / "embedding")
    with pytest.raises(ValueError, match="is no LoRA matrix of a linear layer"):
        export_gguf_adapter(tmp_path / "embedding", str(directory), tmp_path / "other.gguf")
    assert not (tmp_path / "other.gguf").exists()
