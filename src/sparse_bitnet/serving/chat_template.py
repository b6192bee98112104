"""A chat as one text, by the template that came with the model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sparse_bitnet.serving.errors import Refusal
from sparse_bitnet.serving.requests import ChatRequest


def read_chat_template(file: Path) -> str:
    """ValueError for a file that cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {file} cannot be read: {error}") from error


def chat_text(asked: ChatRequest, template: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The messages up to where the assistant goes on, by `template` or, where it is None, the tokenizer's own.

    Refusal where there is neither, or it takes no such chat.
    """
    if template is None and tokenizer.chat_template is None:
        raise Refusal(
            400, "the model's tokenizer has no chat template: use /v1/completions, or serve with --chat-template FILE"
        )
    try:
        text = tokenizer.apply_chat_template(
            [message.to_template() for message in asked.messages],
            chat_template=template, tokenize=False, add_generation_prompt=True, **(asked.chat_template_kwargs or {}),
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError) as error:
        raise Refusal(400, f"the chat template refuses these messages: {error}", param="messages") from error
    return str(text)
