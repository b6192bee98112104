"""Tokens -> text as it becomes certain: never half a character, and nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """`before` are the last tokens of a text that is gone on from: they decide about a space at the beginning."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        while "\ufffd" in tokenizer.decode(list(before)):  # one that is cut spoils others, or has the text told again
            before = before[1:]
        self._characters = DecodeStream(list(before), skip_special_tokens=True)
        self._unread: list[int] = []  # tokens that gave no text yet
        self._held = ""
        self.is_stopped = False

    def put(self, token: int) -> str:
        """What is certain with `token`; at a stop string, what is before it, and `is_stopped`."""
        text = self._held + self._read(token)
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self._held, self.is_stopped = "", True
            return text[: min(ends)]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def _read(self, token: int) -> str:
        self._unread.append(token)
        try:
            text = self._characters.step(self._tokenizer, token) or ""
        except Exception:  # a bare one: a byte that is no text made one before it, which was told, none either
            self._characters = DecodeStream([], skip_special_tokens=True)
            text = "".join(self._characters.step(self._tokenizer, unread) or "" for unread in self._unread)
        if text:
            self._unread.clear()
        return text

    def end(self) -> str:
        """What was held back for a stop string that did not come. A character that is not whole is left out."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
