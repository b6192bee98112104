"""One training run, from its settings to a latent checkpoint: tokenizer, data, model, Trainer, export."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging as transformers_logging

from sparse_bitnet.checkpoint.directory import copy_model, read_json, whole_directory, write_text
from sparse_bitnet.checkpoint.provenance import provenance
from sparse_bitnet.corpus.documents import TextSource
from sparse_bitnet.corpus.token_blocks import StreamedBlocks, TokenBlocks, prepare_tokens
from sparse_bitnet.training.arguments import training_arguments
from sparse_bitnet.training.callback import SparseBitNetCallback, TrainingDiverged
from sparse_bitnet.training.compilation import compile_blocks
from sparse_bitnet.training.config import TrainConfig
from sparse_bitnet.training.console import ConsoleCallback
from sparse_bitnet.training.model import build_model, build_tokenizer
from sparse_bitnet.training.preemption import StopOnSignal
from sparse_bitnet.training.processes import (
    failing_together,
    first_process_first,
    from_all_processes,
    is_first_process,
    join_processes,
)
from sparse_bitnet.training.resumption import Changes, changed_settings, check_changes, told
from sparse_bitnet.training.run_log import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    HISTOGRAMS_FILE,
    METRICS_FILE,
    MODEL,
    TOKENS,
)
from sparse_bitnet.training.sparse_forward import SparseForward
from sparse_bitnet.training.trainer import (
    Trainer,
    checkpoint_damage,
    checkpoint_step,
    checkpoints,
    newest_checkpoint,
)


@dataclass(frozen=True)
class TrainResult:
    """`model_directory` holds the latent checkpoint; `log` is the Trainer's history of log events.

    stopped_by  the signal that ended the run after `steps`: a checkpoint is saved, `model_directory` is not written
    """

    model_directory: Path
    steps: int
    log: list[dict[str, Any]]
    stopped_by: signal.Signals | None = None


def train(config: TrainConfig, resume: str = "never") -> TrainResult:
    """Train as `config` says and leave a latent checkpoint in `output_dir/model`; on all processes of torchrun.

    SIGTERM or SIGINT ends the run early, after the step and with a checkpoint to resume from.

    resume  `never` refuses an output_dir that holds checkpoints; `auto` goes on from the newest whole one, or begins
            anew where there is none; a checkpoint directory goes on from that one

    ValueError for settings that do not fit, OSError for a disk that does not take the files, TrainingDiverged where
    loss or weights are no longer finite; the checkpoints written before stand.
    """
    transformers_logging.disable_progress_bar()
    root = Path(config.output_dir)
    processes, first = join_processes().num_processes, is_first_process()
    with failing_together():
        check_sharding(config, processes)
        source, validation_source = config.data.source(), validation_text(config)
        for text in (source, validation_source):
            if text is not None:
                text.paths()  # a missing file is told before any work
        checkpoint = checkpoint_to_resume(root, resume) if first else None
    checkpoint, changes = from_all_processes(checkpoint)[0], Changes()
    if checkpoint is not None:
        state = read_json(checkpoint / TRAINER_STATE_NAME)
        with failing_together():
            changes = changed_settings(checkpoint.parent / CONFIG_FILE, config)
            check_changes(changes)
        if state["global_step"] >= config.training.steps:  # Trainer would make one step more
            with failing_together():
                if first:
                    if changes:
                        print(f"{state['global_step']} steps are done; not applied: {told(changes)}", flush=True)
                    _export_checkpoint(checkpoint, root / MODEL)
            return TrainResult(root / MODEL, state["global_step"], state["log_history"])
    with first_process_first():
        root.mkdir(parents=True, exist_ok=True)
        tokenizer = build_tokenizer(config, root, source, checkpoint)
        transformers.set_seed(config.training.seed)
        model = build_model(config, tokenizer)
        data = training_blocks(config, source, tokenizer, root / TOKENS)
        validation = None
        if validation_source is not None:
            file = prepare_tokens(validation_source, tokenizer, root / TOKENS)
            blocks = TokenBlocks(file, config.training.block_size, "the validation text")
            validation = Subset(blocks, range(min(len(blocks), config.training.eval_blocks)))
        if first:
            _describe_run(config, root, checkpoint, processes, changes)
    with failing_together():
        trainer, console, stop = _trainer(config, root, model, tokenizer, data, validation)
    try:
        with stop:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except TrainingDiverged:
        with failing_together():  # all processes find it, at the same step
            raise
    finally:
        console.close()
    stopped_by = stop.received if trainer.state.global_step < trainer.state.max_steps else None
    if stopped_by is None:
        with failing_together():
            _export(trainer, root / MODEL)
    return TrainResult(root / MODEL, trainer.state.global_step, trainer.state.log_history, stopped_by)


def check_sharding(config: TrainConfig, processes: int) -> None:
    """ValueError where the run cannot be split as the settings or the launcher ask."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError("accelerate's FSDP is not used here: launch without it, and set training.sharding=fsdp2")
    if config.training.sharding != "none" and processes == 1:
        raise ValueError(
            f"training.sharding={config.training.sharding} needs several processes and there is one: "
            f"start with torchrun, or set training.sharding=none"
        )


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
        check_no_later_checkpoints(root, Path(resume))
        return Path(resume)
    checkpoint, refusals = newest_checkpoint(root)
    for refusal in refusals:
        print(f"passed over: {refusal}", flush=True)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}", flush=True)
    return checkpoint


def check_no_later_checkpoints(root: Path, checkpoint: Path) -> None:
    """ValueError where `root` holds later ones: the run would remove its own, and `--resume auto` go on from those."""
    step = read_json(checkpoint / TRAINER_STATE_NAME)["global_step"]
    later = [path.name for path in checkpoints(root) if checkpoint_step(path) > step]
    if later:
        raise ValueError(
            f"{root} holds later checkpoints than {checkpoint}, {', '.join(later)}: move or delete them, or choose "
            f"another output_dir"
        )


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
) -> tuple[Trainer, ConsoleCallback, StopOnSignal]:
    settings = config.training
    arguments = training_arguments(settings, root, model, evaluates=validation is not None)
    if settings.compile:
        compile_blocks(model)
    console = ConsoleCallback(_tokens_per_step(config, arguments.world_size))
    stop = StopOnSignal()
    quantised = config.recipe.values != "full"
    callback = SparseBitNetCallback(
        schedule=config.pattern_schedule(),
        weight_decay_until=settings.weight_decay_until if quantised else None,
        metrics_file=root / METRICS_FILE,
        histograms_file=root / HISTOGRAMS_FILE,
        residual=config.schedule.residual_schedule(),
        sparse_shapes=SparseForward(
            settings.sparse_forward,
            tokens=settings.batch_size * settings.block_size,
            products_per_step=settings.gradient_accumulation * (2 if settings.gradient_checkpointing else 1),
            dtype=torch.bfloat16 if arguments.bf16 else torch.float32,
            device=arguments.device,
        ),
    )
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=validation,
            processing_class=tokenizer,
            callbacks=[callback, console, stop],
            sharding=settings.sharding,
        )
    except RuntimeError as error:
        if not settings.report_to or "installed" not in str(error):
            raise
        raise ValueError(f"training.report_to={settings.report_to}: {error}") from error
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, console, stop


def _export(trainer: Trainer, directory: Path) -> None:
    """Write the latent checkpoint, in place of the one of an earlier, shorter run; every process takes part."""
    if not is_first_process():
        return trainer.save_model(str(directory))  # writes nothing
    with whole_directory(directory, replace=True) as staging:
        trainer.save_model(str(staging))
        (staging / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle of this machine's settings


def _export_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Write the latent checkpoint of a run that had done all its steps, and perhaps not come to write it."""
    with whole_directory(directory, replace=True) as staging:
        copy_model(checkpoint, staging)


def _describe_run(config: TrainConfig, root: Path, checkpoint: Path | None, processes: int, changes: Changes) -> None:
    """Write settings and environment; tell how a resumed run differs from what it was."""
    tokens = _tokens_per_step(config, processes)
    if checkpoint is not None:
        if changes:
            print(f"changed since the run began: {told(changes)}", flush=True)
        _warn_of_other_batch(checkpoint.parent / ENVIRONMENT_FILE, tokens)
    environment = {**provenance(), "processes": processes, "tokens_per_step": tokens}
    write_text(root / CONFIG_FILE, config.to_yaml())
    write_text(root / ENVIRONMENT_FILE, json.dumps(environment, indent=2) + "\n")


def _tokens_per_step(config: TrainConfig, processes: int) -> int:
    settings = config.training
    return settings.block_size * settings.batch_size * settings.gradient_accumulation * processes


def _warn_of_other_batch(file: Path, tokens: int) -> None:
    """Tell of another number of tokens a step: the place in the data is counted in steps."""
    before = read_json(file).get("tokens_per_step", tokens) if file.exists() else tokens
    if before != tokens:
        print(
            f"tokens a step were {before:,} and are {tokens:,}: the run goes on elsewhere in the data; "
            f"batch_size x gradient_accumulation x processes keeps the place if it stays the same",
            flush=True,
        )
