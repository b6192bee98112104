"""`sparse-bitnet serve MODEL`"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sparse_bitnet.cli.options import Device, Engine, Head, choose_device, refuse_native_options, why_not_native

KEY_VARIABLE = "SPARSE_BITNET_API_KEY"
NEEDED = ("fastapi", "uvicorn", "openai")


def serve(
    model: Annotated[str, typer.Argument(help="Any causal language model: a directory or a Hub id.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free, and tells which.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, show_default=False, help="What clients must send.")
    ] = None,
    engine: Engine = "auto",
    device: Device = "auto",
    max_sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Answers side by side, 16 where memory has room; others wait. Of the native engine."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of prompt and answer together, up to the context. Of the native engine."),
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead of the tokenizer's own. Of the native engine.")
    ] = None,
    head: Head = None,
) -> None:
    """Answer OpenAI's HTTP interface: chat and text completions, streamed or whole."""
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ValueError(f"serve needs the package {missing[0]}: pip install 'sparse-bitnet[serve]'")
    from sparse_bitnet.serving.guard import Guard
    from sparse_bitnet.serving.listen import bind, is_loopback, listen, own_hosts, url

    if api_key is not None and not (api_key.isascii() and api_key.strip()):
        raise ValueError(f"--api-key (or {KEY_VARIABLE}) must be of ASCII characters, and not empty")
    chosen = choose_device(device)
    reason = why_not_native(engine, model, chosen)
    refuse_native_options(
        reason, max_sequences=max_sequences, max_model_len=max_model_len, chat_template=chat_template, head=head
    )
    with bind(host, port) as bound:  # before the model is opened, which takes longer than to learn of a taken port
        if api_key is None and not is_loopback(bound):
            print(f"anyone who reaches {host} is answered: --api-key asks for a key", file=sys.stderr)
        end: Any = None
        if reason is None:
            from sparse_bitnet.serving.app import MOST_SEQUENCES, create_app, open_served

            served = open_served(model, cast(Any, head or "int8"), max_sequences, max_model_len, chat_template)
            if max_sequences is None and (most := served.worker.most) < MOST_SEQUENCES:
                room = f"memory has room for {most} answers of {served.context} tokens side by side"
                print(f"{room}, others wait: --max-model-len gives room for more", file=sys.stderr)
            app, end, by = create_app(served), served.worker.end, "the native engine"
        else:
            if engine == "auto" and chosen == "cpu":
                print(f"transformers serves, not the native engine: {reason}", file=sys.stderr)
            from sparse_bitnet.serving.transformers_app import create_transformers_app

            app, by = create_transformers_app(model, chosen), f"transformers on {chosen}"
        hosts = own_hosts(host, bound) if api_key is None and is_loopback(bound) else None
        guarded = Guard(app, api_key, hosts=hosts)
        listen(guarded, bound, lambda: print(f"{model}, by {by}, at {url(bound)}/v1", flush=True), end)
