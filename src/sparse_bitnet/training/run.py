"""One training run, from its settings to a latent checkpoint: tokenizer, data, model, Trainer, export."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging as transformers_logging

from sparse_bitnet.checkpoint.directory import whole_directory, write_text
from sparse_bitnet.checkpoint.provenance import provenance
from sparse_bitnet.corpus.documents import TextSource
from sparse_bitnet.corpus.token_blocks import StreamedBlocks, TokenBlocks, prepare_tokens
from sparse_bitnet.training.callback import SparseBitNetCallback
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.console import ConsoleCallback
from sparse_bitnet.training.model import build_model, build_tokenizer
from sparse_bitnet.training.trainer import Trainer, checkpoint_damage, checkpoints, newest_checkpoint

MODEL, TOKENS = "model", "tokens"  # below output_dir, beside the checkpoints
CONFIG_FILE, METRICS_FILE, ENVIRONMENT_FILE = "config.yaml", "metrics.jsonl", "env.json"


@dataclass(frozen=True)
class TrainResult:
    """`model_directory` holds the latent checkpoint; `log` is the Trainer's history of log events."""

    model_directory: Path
    steps: int
    log: list[dict[str, Any]]


def train(config: TrainConfig, resume: str = "never") -> TrainResult:
    """Train as `config` says and leave a latent checkpoint in `output_dir/model`.

    resume  `never` refuses an output_dir that holds checkpoints; `auto` goes on from the newest whole one, or begins
            anew where there is none; a checkpoint directory goes on from that one

    ValueError for settings that do not fit, OSError for a disk that does not take the files, TrainingDiverged where
    loss or weights are no longer finite; the checkpoints written before stand.
    """
    transformers_logging.disable_progress_bar()
    root = Path(config.output_dir)
    checkpoint = checkpoint_to_resume(root, resume)
    source, validation_source = config.data.source(), validation_text(config)
    for text in (source, validation_source):
        if text is not None:
            text.paths()  # a missing file is told before any work
    root.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config, root, source, resumed=checkpoint is not None)
    transformers.set_seed(config.training.seed)
    model = build_model(config, tokenizer)
    data = training_blocks(config, source, tokenizer, root / TOKENS)
    validation = None
    if validation_source is not None:
        file = prepare_tokens(validation_source, tokenizer, root / TOKENS)
        blocks = TokenBlocks(file, config.training.block_size, "the validation text")
        validation = Subset(blocks, range(min(len(blocks), config.training.eval_blocks)))
    _warn_of_changes(root / CONFIG_FILE, config, resumed=checkpoint is not None)
    write_text(root / CONFIG_FILE, config.to_yaml())
    write_text(root / ENVIRONMENT_FILE, json.dumps(provenance(), indent=2) + "\n")
    trainer, console = _trainer(config, root, model, tokenizer, data, validation)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        console.close()
    if trainer.is_world_process_zero():
        _export(trainer, root / MODEL)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(root / MODEL, trainer.state.global_step, trainer.state.log_history)


def checkpoint_to_resume(root: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` (see `train`) means for the run in `root`; says which it passes over."""
    if resume == "never":
        if checkpoints(root) or (root / MODEL).exists():
            raise ValueError(f"{root} holds a run already: go on with --resume auto, or choose another output_dir")
        return None
    if resume != "auto":
        damage = checkpoint_damage(Path(resume))
        if damage is not None:
            raise ValueError(damage)
        return Path(resume)
    checkpoint, refusals = newest_checkpoint(root)
    for refusal in refusals:
        print(f"passed over: {refusal}", flush=True)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}", flush=True)
    return checkpoint


def validation_text(config: TrainConfig) -> TextSource | None:
    """The validation text of a run, None where it has none."""
    files = tuple(config.data.validation_files)
    return TextSource(files, text_field=config.data.text_field) if files else None


def training_blocks(
    config: TrainConfig, source: TextSource, tokenizer: PreTrainedTokenizerBase, cache: Path
) -> Dataset[Any]:
    """The training text in blocks, prepared below `cache` or streamed."""
    if config.data.streaming:
        return StreamedBlocks(source, tokenizer, config.training.block_size)
    return TokenBlocks(prepare_tokens(source, tokenizer, cache), config.training.block_size)


def _trainer(
    config: TrainConfig,
    root: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset[Any],
    validation: Dataset[Any] | None,
) -> tuple[Trainer, ConsoleCallback]:
    arguments = _arguments(config, root, evaluates=validation is not None)
    settings = config.training
    tokens_per_step = settings.block_size * settings.batch_size * settings.gradient_accumulation * arguments.world_size
    console = ConsoleCallback(tokens_per_step)
    quantised = config.recipe.values != "full"
    callback = SparseBitNetCallback(
        schedule=config.pattern_schedule(),
        weight_decay_until=settings.weight_decay_until if quantised else None,
        metrics_file=root / METRICS_FILE,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[callback, console],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, console


def _arguments(config: TrainConfig, root: Path, evaluates: bool) -> TrainingArguments:
    settings = config.training
    bf16 = settings.precision == "bf16" or (
        settings.precision == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    )
    known = {field.name for field in fields(TrainingArguments)}  # renamed in the course of transformers 5
    option = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    checkpointing: dict[str, Any] = {option: True} if settings.gradient_checkpointing else {}
    return TrainingArguments(
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
        torch_compile=settings.compile,
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
        **checkpointing,
    )


def _export(trainer: Trainer, directory: Path) -> None:
    """Write the latent checkpoint, in place of the one of an earlier, shorter run."""
    with whole_directory(directory, replace=True) as staging:
        trainer.save_model(str(staging))
        (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle of this machine's settings


def _warn_of_changes(file: Path, config: TrainConfig, resumed: bool) -> None:
    """Tell which settings differ from those that the resumed run began with."""
    if not resumed or not file.exists():
        return
    before, now = file.read_text(encoding="utf-8").splitlines(), config.to_yaml().splitlines()
    changed = sorted(line.strip() for line in set(now) - set(before))
    if changed:
        print(f"changed since the run began: {', '.join(changed)}", flush=True)
