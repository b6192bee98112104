"""Train a LoRA adapter over a packed, frozen model with PEFT and TRL, and write both for llama.cpp.

    pip install 'sparse-bitnet[finetune,gguf]'
    python examples/finetune_lora.py packed finetuned [chats.jsonl]
    llama-cli -m finetuned/base.gguf --lora finetuned/adapter.gguf \\
        --jinja --chat-template-file finetuned/adapter/chat_template.jinja

The adapter stays beside the base, whose weights stay exactly ternary. Their sum is not: merged into it, each weight
takes 16 bits, and rounding the sum to ternary again loses much of what was learned. The script measures all of these.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from chats import TEMPLATE, conversations, mean_loss
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sparse_bitnet import convert, prepare
from sparse_bitnet.interop.gguf import export_gguf
from sparse_bitnet.interop.gguf_adapter import export_gguf_adapter
from sparse_bitnet.interop.peft import with_packed_layers
from sparse_bitnet.nn.stored_settings import named_layers

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(packed: str, output: Path, chats: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(packed)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    base: Any = AutoModelForCausalLM.from_pretrained(packed)
    recipe = next(layer.recipe for _, layer in named_layers(base))
    training, held_out = conversations(chats)
    settings = SFTConfig(
        output_dir=str(output),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        warmup_steps=5,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    lora = with_packed_layers(LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, task_type="CAUSAL_LM"))
    trainer = SFTTrainer(base, settings, train_dataset=training, processing_class=tokenizer, peft_config=lora)
    adapted: Any = trainer.model
    trainer.train()
    trainer.save_model(str(output / "adapter"))
    with adapted.disable_adapter():
        losses = {"base": mean_loss(adapted, tokenizer, held_out)}
    losses["base + adapter"] = mean_loss(adapted, tokenizer, held_out)

    merged: Any = AutoModelForCausalLM.from_pretrained(packed)
    merged.dequantize()
    merged = PeftModel.from_pretrained(merged, str(output / "adapter")).merge_and_unload()
    losses["merged, 16 bits a weight"] = mean_loss(merged, tokenizer, held_out)
    losses["merged, ternary again"] = mean_loss(convert(prepare(merged, recipe)), tokenizer, held_out)
    for name, loss in losses.items():
        print(f"{name:26} {loss:.3f} nats a token on what was held out")

    written = export_gguf(packed, output / "base.gguf")
    size = export_gguf_adapter(output / "adapter", packed, output / "adapter.gguf")
    print(f"base.gguf {written.bytes / 1e6:.2f} MB, adapter.gguf {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
