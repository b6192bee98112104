"""Stock llama.cpp, and our own model, asked for the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

needs_llama = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="needs the package xllamacpp")


@contextmanager
def llama_cpp(file: Path, adapter: Path | None = None) -> Iterator[Callable[[Any], dict[str, Any]]]:
    """Stock llama.cpp with `file`, and an adapter on top; asks it for one token after a prompt, with the ten best."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.warmup = 128, 1, 0, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = -1
    if adapter is not None:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(settings)

    def ask(prompt: Any) -> dict[str, Any]:
        answers: list[Any] = []
        request = {"prompt": prompt, "n_predict": 1, "temperature": 0, "n_probs": 10}
        server.handle_completions(request, answers.append)
        (step,) = answers[-1]["choices"][0]["logprobs"]["content"]
        return {**step, "prompt_tokens": answers[-1]["usage"]["prompt_tokens"]}

    yield ask


def log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
