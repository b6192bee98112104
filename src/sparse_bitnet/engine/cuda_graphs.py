"""A model that writes on a GPU: a step, from token to logits, is one CUDA graph.

Called from Python a step waits for Python, which launches a kernel in some microseconds, as long as most of them take;
recorded, they follow each other. The code is that of transformers, or one launch for all layers where the model and the
GPU have that (one_launch.py).

Shapes: S sequences, P tokens of a prompt, L places of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparse_bitnet.engine import one_launch
from sparse_bitnet.engine.architecture import MODEL_TYPES, check_tokens
from sparse_bitnet.engine.rotary import Rotary
from sparse_bitnet.engine.sampling import Sampling
from sparse_bitnet.kernels.capture import capture

GROUPED = "sparse_bitnet_grouped"
READING = "sdpa"  # of several tokens, where no mask means a causal one
PLACES = 128  # the cache ends at a multiple of so many
COLDEST = 1e-6  # temperature below which nothing changes any more, and logits over it are infinite


def obstacle(model: PreTrainedModel) -> str | None:
    """Why a step of `model` cannot be one CUDA graph; None where it can."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or model.device.type != "cuda":
        return f"it writes on one GPU, and the model is on {', '.join(sorted(map(str, devices)))}"
    return _what_is_unknown(model)


def _what_is_unknown(model: PreTrainedModel) -> str | None:
    config: Any = model.config
    if config.model_type not in MODEL_TYPES:
        return f"it knows {', '.join(MODEL_TYPES)}, and the model is of the type {config.model_type}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some layers see a window of the text, and its cache keeps all of it"
    rotary = Rotary.from_config(config.to_dict(), 2).kind
    if rotary not in Rotary.KINDS:  # others look at the length of the text, which Python would have to wait for
        return f"rope_type {rotary!r} is none of {', '.join(Rotary.KINDS)}"
    return None


@torch.no_grad()
def why_not_in_one_launch(model: PreTrainedModel) -> str | None:
    """Why a step of `model` is recorded kernel by kernel; None where all layers are one."""
    answer = Sequences(model, 1, PLACES).step_in_one_launch()
    return answer if isinstance(answer, str) else None


def write(
    model: PreTrainedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that follow a prompt, as they come; one of `stop` is the last.

    The iterator can be left at any time; until then the model must stay where it is and as it is. On a CPU it computes
    the same, call by call. ValueError for an empty prompt and a model that it does not know, and later where logits are
    no numbers.
    """
    unknown = _what_is_unknown(model)
    if unknown is not None:
        raise ValueError(unknown)
    check_tokens(prompt, model.config.vocab_size)
    return _write(model, list(prompt), max_new_tokens, sampling or Sampling(), stop)


@torch.no_grad()
def _write(
    model: PreTrainedModel, prompt: list[int], max_new_tokens: int, sampling: Sampling, stop: Collection[int]
) -> Iterator[int]:
    places = -(-(len(prompt) + max_new_tokens + 1) // PLACES) * PLACES
    work = Sequences(model, 1, places)
    seen = torch.zeros(1, places, dtype=torch.long, device=model.device)
    seen[0, : len(prompt)] = torch.tensor(prompt)
    if len(prompt) > 1:
        with attention(model, READING):
            work.read(seen[:, : len(prompt) - 1])
    choose = _chooser(sampling, model.device)
    step = work.recorded_step(seen[:, len(prompt) - 1 : len(prompt)], len(prompt) - 1)
    for count in range(len(prompt), len(prompt) + max_new_tokens):
        chosen = choose(seen[:, :count], step())
        seen[:, count] = work.token[0] = chosen
        token = int(chosen)
        yield token
        if token in stop:
            return


class FixedLayer(StaticLayer):
    """A layer of transformers' static cache written at `positions`, which all share: by itself each counts its own."""

    keys: Tensor
    values: Tensor
    positions: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.positions, key_states)
        self.values.index_copy_(2, self.positions, value_states)
        return self.keys, self.values


class Sequences:
    """A model at work on `count` sequences with `length` places each, which are all as long."""

    def __init__(self, model: PreTrainedModel, count: int, length: int) -> None:
        self.model, config, device = model, model.config, model.device
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.token = torch.zeros(count, 1, dtype=torch.long, device=device)
        self.layers = [FixedLayer(length) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(list(self.layers))
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache.early_initialization(count, config.num_key_value_heads, width, model.dtype, device)
        self.places = torch.arange(length, device=device)
        self.mask = torch.empty(count, 1, 1, length, dtype=model.dtype, device=device)  # added to scores

    def begin(self, token: Tensor, position: int) -> None:
        """Have the next step take `token` [S, 1], at `position`."""
        self.token.copy_(token)
        self.position.fill_(position)
        self.mask.copy_(torch.where(self.places <= position, 0.0, -torch.inf))

    def read(self, prompt: Tensor) -> Tensor:
        """prompt [S, P], the first tokens of all -> logits [S, V] of the one that follows; by the attention READING."""
        mask = None  # a causal one, but of one token a mask that sees all
        if prompt.shape[1] == 1:
            mask = torch.where(self.places == 0, 0.0, -torch.inf).to(self.mask).expand_as(self.mask)
        return self._forward(prompt, self.places[: prompt.shape[1]], mask)

    def step(self) -> Tensor:
        """Read `token` at `position`, which goes on by one; logits [S, V] of the token that follows."""
        logits = self._forward(self.token, self.position, self.mask)
        self.position.add_(1)
        self.mask.index_fill_(-1, self.position, 0.0)
        return logits

    def greedy(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What does `step`, and has the likeliest token be the next that is read."""

        def greedy_step() -> Tensor:
            logits = step()
            self.token.copy_(logits.argmax(-1, keepdim=True))
            return logits

        return greedy_step

    def step_in_one_launch(self) -> Callable[[], Tensor] | str:
        """What does the same as `step`, all layers in one launch and without mask; or why there is none."""
        if len(self.token) > 1:
            return f"it takes one sequence, and there are {len(self.token)}"
        reason = obstacle(self.model) or one_launch.obstacle(self.model)
        if reason is not None:
            return reason
        layers, model = one_launch.step_of(one_launch.decoder_of(self.model, self.layers)), cast(Any, self.model)
        if isinstance(layers, str):
            return layers

        def step() -> Tensor:
            x = model.get_input_embeddings()(self.token[0])  # [1, H]
            layers(x[0], self.position)
            self.position.add_(1)
            return model.get_output_embeddings()(model.base_model.norm(x))

        return step

    def recorded_step(self, token: Tensor, position: int) -> Callable[[], Tensor]:
        """`begin`, and a function that does what `step` does; its logits are overwritten by the next."""
        self.begin(token, position)
        if self.model.device.type != "cuda":
            return self._called_step
        in_one_launch = self.step_in_one_launch()
        step = self.step if isinstance(in_one_launch, str) else in_one_launch
        with attention(self.model, GROUPED):
            graph, logits = capture(step, self.model.device)
        self.begin(token, position)

        def replay(keeps: tuple[object, ...] = (self, step)) -> Tensor:  # what the graph reads
            graph.replay()
            return logits

        return replay

    def _called_step(self) -> Tensor:
        with attention(self.model, GROUPED):
            return self.step()

    def _forward(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.layers:
            layer.positions = positions
        by_kind = hasattr(self.model.base_model, "has_sliding_layers")  # Qwen's take a mask for each kind of layer
        output = self.model(
            input_ids=tokens, position_ids=positions[None], past_key_values=self.cache, use_cache=True,
            attention_mask={"full_attention": mask} if by_kind else mask, logits_to_keep=1,
        )  # fmt: skip
        return output.logits[:, -1]


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The attention of this name: transformers', or GROUPED for one token a sequence."""
    before: Any = model.config._attn_implementation
    if before == name:
        yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """`sdpa` where heads share keys and values [S, H, L, D]: given a mask, that of transformers repeats them."""
    output = scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


AttentionInterface.register(GROUPED, grouped_attention)


def _chooser(sampling: Sampling, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of the tokens so far [1, T] and logits [1, V] that gives the next token [1]."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.temperature:
        processors.append(TemperatureLogitsWarper(max(float(sampling.temperature), COLDEST)))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(float(sampling.top_p)))
    generator = torch.Generator(device)
    if sampling.seed is not None:
        generator.manual_seed(sampling.seed)
    else:
        generator.seed()

    def choose(seen: Tensor, logits: Tensor) -> Tensor:
        if not bool(logits.isfinite().all()):
            raise ValueError("the logits are no numbers: the model is damaged, or its dtype too narrow")
        scores: Tensor = processors(seen, logits.float())  # type: ignore[arg-type]
        if not sampling.temperature:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0]

    return choose
