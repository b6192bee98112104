"""`sparse-bitnet generate MODEL --prompt TEXT`"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any, cast

import typer

from sparse_bitnet.cli.options import Device, Engine, Head, choose_device, refuse_native_options, why_not_native
from sparse_bitnet.engine.sampling import LARGEST_PENALTY, LEAST_PENALTY


def generate(
    model: Annotated[str, typer.Argument(help="Any causal language model: a directory or a Hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0 is no limit.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=LEAST_PENALTY, max=LARGEST_PENALTY)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text by the same engine.")] = None,
    device: Device = "auto",
    engine: Engine = "auto",
    head: Head = None,
) -> None:
    """Stream text from a model."""
    from sparse_bitnet.corpus.tokenizer import load_tokenizer, prompt_tokens
    from sparse_bitnet.engine.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    chosen = choose_device(device)
    reason = why_not_native(engine, model, chosen)
    refuse_native_options(reason, head=head)
    if reason is None:
        from sparse_bitnet.engine.decoder import Decoder

        decoder = Decoder(model, head=cast(Any, head or "int8"))
        tokenizer = load_tokenizer(model)
        ids = prompt_tokens(tokenizer, prompt)
        tokens = decoder.generate([ids], max_new_tokens, sampling, stop=decoder.end_tokens)
        _stream(tokenizer, ids, (token for _, token in tokens))
        return
    from sparse_bitnet.checkpoint.loading import open_model

    language_model = open_model(model, device=chosen).eval()
    tokenizer = load_tokenizer(model)
    if chosen.startswith("cuda"):
        _accelerate(language_model)
    if engine == "auto" and chosen == "cpu":
        print(f"transformers writes, not the native engine: {reason}", file=sys.stderr)
    ids = prompt_tokens(tokenizer, prompt)
    _check_room(language_model, ids, max_new_tokens)
    from sparse_bitnet.engine import cuda_graphs

    if engine == "auto" and cuda_graphs.obstacle(language_model) is None:
        slow = cuda_graphs.why_not_in_one_launch(language_model)
        if slow is not None:
            print(f"a step is recorded kernel by kernel: {slow}", file=sys.stderr)
        end: Any = language_model.generation_config.eos_token_id
        stop = end if isinstance(end, list) else [end]
        _stream(tokenizer, ids, cuda_graphs.write(language_model, ids, max_new_tokens, sampling, stop))
    else:
        _write_with_transformers(language_model, tokenizer, ids, max_new_tokens, sampling)


def _accelerate(language_model: Any) -> None:
    from sparse_bitnet.nn.acceleration import accelerate
    from sparse_bitnet.nn.packed_linear import PackedLinear

    if any(isinstance(layer, PackedLinear) for layer in language_model.modules()):
        accelerate(language_model, (1, 64, 512, 2048), language_model.dtype)


def _stream(tokenizer: Any, ids: list[int], tokens: Iterable[int]) -> None:
    import torch
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    streamer.put(torch.tensor(ids))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()


def _check_room(language_model: Any, ids: list[int], max_new_tokens: int) -> None:
    context = getattr(language_model.config, "max_position_embeddings", None)
    if context is not None and len(ids) + max_new_tokens > context:
        raise ValueError(
            f"{len(ids)} tokens of prompt and {max_new_tokens} new ones exceed the model's context of {context}"
        )


def _write_with_transformers(
    language_model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, sampling: Any
) -> None:
    import torch
    from transformers import TextStreamer

    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    warm = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    prompt = torch.tensor([ids], device=language_model.device)
    language_model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=sampling.temperature > 0,
        repetition_penalty=sampling.repetition_penalty,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **(warm if sampling.temperature > 0 else {}),
    )
