"""The objects that OpenAI's interface answers with."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4


class Answer:
    """One answer, whole or in pieces, which share their id and time."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self.is_chat = is_chat
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid4().hex}"
        self.common = {"created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, **self.common, "choices": [choice], "usage": usage}

    def piece(self, text: str | None, reason: str | None = None, *, is_first: bool = False) -> dict[str, Any]:
        """A part of the text; the last piece has none and tells the reason of the end."""
        delta: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if text is not None:
            delta["content"] = text
        said = {"delta": delta} if self.is_chat else {"text": text or ""}
        return self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": reason}])

    def counts(self, usage: dict[str, int]) -> dict[str, Any]:
        """What follows the last piece where it was asked for."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        return {"id": self.id, "object": kind, **self.common, "choices": choices}


def usage(prompt: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def model_card(name: str, created: int, context: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "sparse-bitnet", "max_model_len": context}
