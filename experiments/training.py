"""From the settings of a run to its result.

A loop of its own and not the Trainer of the library: a step of 131,072 tokens takes a model of 1.8 M weights about 20
ms on an H200, and a data loader, a collator and a log event a step would take as long again; token ids stay on the
GPU here. What is under test is the library's all the same: `prepare`, `StepWeights` and their kernels, the schedules,
the monitor, the perplexity.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from experiments.corpus import END_OF_TEXT, Corpus
from experiments.readings import latent_histogram
from experiments.settings import Run
from experiments.zero_shot import LONGEST, answer_tasks
from sparse_bitnet.checkpoint.provenance import provenance
from sparse_bitnet.evaluation.perplexity import perplexity
from sparse_bitnet.nn.step_weights import StepWeights
from sparse_bitnet.nn.swap import prepare, set_pattern, set_residual
from sparse_bitnet.training.compilation import compile_blocks
from sparse_bitnet.training.monitors import MaskMonitor
from sparse_bitnet.training.schedules import falling_share

READINGS = 60  # of the masks in the course of a run
POINTS = 100  # of the loss curve that is kept
UNTIMED_STEPS = 10  # compilation and the first allocations


def train(run: Run, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """The result of `run`: settings, curves, perplexities and whatever the report draws; JSON can hold it."""
    start = time.perf_counter()
    model = build_model(run, device)
    training = Training(run, model, corpus.ids["train"])
    training.run()
    training.step_weights.release()
    result: dict[str, Any] = {
        "key": run.key,
        "name": run.name,
        **provenance(),
        "corpus": corpus.description,
        "seed": run.seed,
        "settings": run.to_dict(),
        "steps": run.steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "diverged_at": training.diverged_at,
        **training.curves(),
    }
    if training.diverged_at is None:
        with torch.compiler.set_stance("force_eager"):
            result["perplexity"] = {split: _perplexity(model, run, corpus, split) for split in ("valid", "test")}
            if run.zero_shot:
                accuracies = answer_tasks(model, corpus.tasks)
                result["zero_shot"] = {name: asdict(accuracy) for name, accuracy in accuracies.items()}
        result["layers"] = {name: asdict(layer) for name, layer in training.monitor.read(model)[1].items()}
        result["histogram"] = latent_histogram(model)
    result["seconds"] = time.perf_counter() - start
    return result


def build_model(run: Run, device: torch.device) -> PreTrainedModel:
    """The model before its first step, fp32 masters; weights are drawn on the CPU, so that a seed is one everywhere."""
    shape = run.shape
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=None,
    )
    torch.manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return prepare(model, run.recipe).to(device).train()


class Training:
    """The loop of one run, and what it saw. On a GPU bf16 arithmetic over fp32 masters, compiled; on a CPU fp32."""

    def __init__(self, run: Run, model: PreTrainedModel, ids: Tensor) -> None:
        self.run_settings, self.model, self.device = run, model, ids.device
        self.on_gpu = self.device.type == "cuda"
        self.blocks = ids[: len(ids) // run.sequence * run.sequence].view(-1, run.sequence)
        if len(self.blocks) < run.batch:
            raise ValueError(f"{len(self.blocks)} sequences of {run.sequence} tokens do not fill a step of {run.batch}")
        self.step_weights = StepWeights(model, torch.bfloat16 if self.on_gpu else None)
        self.optimizer = torch.optim.AdamW(
            _groups(model, run.weight_decay), lr=0.0, betas=(run.beta1, run.beta2), fused=self.on_gpu
        )
        self.pattern = run.recipe.pattern
        self.monitor = MaskMonitor()
        self.losses: list[Tensor] = []
        self.readings: list[dict[str, Any]] = []
        self.diverged_at: int | None = None
        self.tokens_per_second = 0.0
        self._loss = head_loss
        if self.on_gpu:
            compile_blocks(model)
            self._loss = torch.compile(head_loss)

    def run(self) -> None:
        run = self.run_settings
        interval = max(1, run.steps // READINGS)
        begin, timed = time.perf_counter(), 0
        self._prepare_step(0)
        self.monitor.read(self.model)
        for step, batch in zip(range(run.steps), batches(self.blocks, run.batch, run.seed), strict=False):
            if step == UNTIMED_STEPS:
                begin, timed = self._now(), step
            self.losses.append(self.step(step, batch))
            if (step + 1) % interval == 0 or step + 1 == run.steps:
                if not math.isfinite(float(self.losses[-1])):
                    self.diverged_at = step + 1
                    return
                overall, _ = self.monitor.read(self.model)
                assert overall is not None
                self.readings.append({"step": step + 1, **asdict(overall)})
        self.tokens_per_second = (run.steps - timed) * run.batch * run.sequence / (self._now() - begin)

    def step(self, step: int, batch: Tensor) -> Tensor:
        """One optimizer step on token ids [B, L]; its loss, still on the device."""
        self._prepare_step(step)
        self.step_weights.refresh()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            hidden = self.model.model(input_ids=batch, use_cache=False).last_hidden_state
            loss = self._loss(hidden, self.model.lm_head.weight, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.run_settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _prepare_step(self, step: int) -> None:
        """Pattern, residual, learning rate and weight decay of this step."""
        run = self.run_settings
        pattern = run.schedule().pattern_at(step, run.steps)
        if pattern != self.pattern:
            set_pattern(self.model, pattern)
            self.pattern = pattern
        residual = run.residual_schedule()
        if residual is not None:
            set_residual(self.model, residual.share_at(step, run.steps))
        decay = 1.0 if run.decay_until is None else falling_share(step, run.steps, run.decay_until)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(run, step)
            group["weight_decay"] = group["initial_decay"] * decay

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def curves(self) -> dict[str, Any]:
        """The loss, as means over equal stretches of steps, and the readings."""
        losses = torch.stack(self.losses).float().cpu()
        stretch = max(1, len(losses) // POINTS)
        means = [
            [min(i + stretch, len(losses)), float(losses[i : i + stretch].mean())]
            for i in range(0, len(losses), stretch)
        ]
        return {
            "loss": [[step, mean if math.isfinite(mean) else None] for step, mean in means],
            "readings": self.readings,
            "tokens_per_second": self.tokens_per_second,
            "bytes_at_most": torch.cuda.max_memory_allocated() if self.on_gpu else 0,
        }


def head_loss(hidden: Tensor, head: Tensor, ids: Tensor) -> Tensor:
    """Mean loss of each token but the first, given hidden [B, L, H], head [V, H], ids [B, L]."""
    logits = F.linear(hidden[:, :-1], head)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def learning_rate(run: Run, step: int) -> float:
    """Up in a line over the warm-up, then down half a cosine; the step after the last would have its final share."""
    if step < run.warmup_steps:
        return run.learning_rate * (step + 1) / run.warmup_steps
    done = (step - run.warmup_steps) / max(1, run.steps - run.warmup_steps)
    height = (1 + math.cos(math.pi * done)) / 2
    return run.learning_rate * (run.final_rate_share + (1 - run.final_rate_share) * height)


def batches(blocks: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Token ids [batch, L] int64 without end: all blocks in an order that the seed draws, then in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(blocks), generator=generator).to(blocks.device)
        for start in range(0, len(blocks) - batch + 1, batch):
            yield blocks[order[start : start + batch]].long()


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices decay, norms and biases do not."""
    parameters = list(model.parameters())
    return [
        {"params": [one for one in parameters if one.dim() > 1], "initial_decay": decay},
        {"params": [one for one in parameters if one.dim() <= 1], "initial_decay": 0.0},
    ]


def _perplexity(model: PreTrainedModel, run: Run, corpus: Corpus, split: str) -> float:
    """In windows of the length of the training sequences, in fp32."""
    batch = max(1, 16_384 // run.sequence)
    return perplexity(model, corpus.ids[split].long(), corpus.bytes[split], run.sequence, batch).perplexity
