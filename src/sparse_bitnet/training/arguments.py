"""The settings of a run as the arguments of the Hugging Face Trainer."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainingArguments

from sparse_bitnet.training.config import TrainingSettings
from sparse_bitnet.training.fused_loss import ONLY_THE_LOSS, fused_loss_obstacle
from sparse_bitnet.training.processes import is_first_process


def training_arguments(
    settings: TrainingSettings, root: Path, model: PreTrainedModel, evaluates: bool
) -> TrainingArguments:
    """What Trainer is told; ValueError where the fused loss is asked for and cannot be had."""
    bf16 = settings.precision == "bf16" or (
        settings.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    known = {field.name for field in fields(TrainingArguments)}  # renamed in the course of transformers 5
    option = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    checkpointing: dict[str, Any] = {option: True} if settings.gradient_checkpointing else {}
    arguments = TrainingArguments(
        output_dir=str(root),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.final_learning_rate_share},
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        bf16=bf16,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,  # a NaN is to be seen, not averaged away
        save_steps=settings.save_every,
        save_total_limit=settings.keep_checkpoints,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_every,
        prediction_loss_only=True,
        report_to=settings.report_to or "none",
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        ddp_find_unused_parameters=any("experts" in name for name, _ in model.named_parameters()),
        use_liger_kernel=uses_fused_loss(settings, model),
        liger_kernel_config=ONLY_THE_LOSS,
        **checkpointing,
    )
    if arguments.n_gpu > 1:  # Trainer would take them all by DataParallel, and as many times the batch
        count = arguments.n_gpu
        print(f"1 of {count} GPUs is used: start with torchrun --nproc-per-node {count} to use all", flush=True)
        arguments._n_gpu = 1
    return arguments


def uses_fused_loss(settings: TrainingSettings, model: PreTrainedModel) -> bool:
    """Whether the loss is computed without the logits; says in a line what a GPU lacks for it."""
    obstacle = fused_loss_obstacle(model)
    if settings.fused_loss is True and obstacle is not None:
        raise ValueError(f"training.fused_loss=true: {obstacle}")
    if settings.fused_loss == "auto" and obstacle is not None and torch.cuda.is_available() and is_first_process():
        print(f"the loss holds all logits: {obstacle}", flush=True)
    return settings.fused_loss is not False and obstacle is None
