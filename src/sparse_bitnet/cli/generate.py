"""`sparse-bitnet generate MODEL --prompt TEXT`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparse_bitnet.cli.options import Device, choose_device


def generate(
    model: Annotated[str, typer.Argument(help="Any causal language model: a directory or a Hub id.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="0 is no limit.")] = 50,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=0.01)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    device: Device = "auto",
) -> None:
    """Stream text from a model."""
    import torch
    from transformers import TextStreamer

    from sparse_bitnet.checkpoint.loading import open_model
    from sparse_bitnet.corpus.tokenizer import load_tokenizer

    language_model: Any = open_model(model, device=choose_device(device)).eval()
    tokenizer = load_tokenizer(model)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=True)["input_ids"]
    if ids.numel() == 0:  # an empty prompt begins a document
        begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if begin is None:
            raise ValueError("the tokenizer has no token that begins a text: give a --prompt")
        ids = torch.tensor([[begin]])
    ids = ids.long().to(language_model.device)
    context = getattr(language_model.config, "max_position_embeddings", None)
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"{ids.shape[1]} tokens of prompt and {max_new_tokens} new ones exceed the model's context of {context}"
        )
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else {}
    language_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=repetition_penalty,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
