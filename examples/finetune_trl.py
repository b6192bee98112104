"""Fine-tune a latent checkpoint on conversations with TRL, pack it, and write it for llama.cpp.

    pip install 'sparse-bitnet[finetune,gguf]'
    python examples/finetune_trl.py runs/sparse-bitnet/model finetuned [chats.jsonl]

The weights stay ternary and sparse throughout: what is trained is what is packed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from chats import TEMPLATE, conversations
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from sparse_bitnet import SparseBitNetCallback, convert
from sparse_bitnet.interop.gguf import export_gguf


def main(latent: str, output: Path, chats: str | None = None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(latent)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(latent, dtype=torch.float32)  # fp32 masters: see SparseBitLinear
    training, held_out = conversations(chats)
    settings = SFTConfig(
        output_dir=str(output),
        max_steps=60,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        warmup_steps=5,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=torch.cuda.is_available(),
        gradient_checkpointing=False,
    )
    output.mkdir(parents=True, exist_ok=True)
    callback = SparseBitNetCallback(
        metrics_file=output / "metrics.jsonl",  # `sparse-bitnet report OUTPUT` draws them
        histograms_file=output / "histograms.jsonl",
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    print(f"held out: loss {trainer.evaluate()['eval_loss']:.3f}")
    trainer.save_model(str(output / "latent"))
    convert(model.eval()).save_pretrained(output / "packed")
    tokenizer.save_pretrained(output / "packed")
    written = export_gguf(str(output / "packed"), output / "model.gguf")
    print(f"{output / 'model.gguf'}: {written.bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
