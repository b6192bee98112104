"""A tokenizer.json as the metadata of a GGUF file: byte-level BPEs, by the name that llama.cpp has for their rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf

from sparse_bitnet.corpus.tokenizer import TOKENIZER_FILE, load_tokenizer

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {WORDS % "": "qwen2", WORDS % "{1,3}": "llama-bpe"}
"""The expression by which a Split step cuts text into words -> the name of that in llama.cpp."""
REMEDY = "without this file the model is exported for token numbers only"


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: Any) -> tuple[str, ...]:
    """The tokenizer in `directory` into the file; remarks for the user. ValueError for one that llama.cpp has not."""
    file = directory / TOKENIZER_FILE
    if not file.exists():
        writer.add_tokenizer_model("no_vocab")
        return (f"{directory} has no {TOKENIZER_FILE}: the file takes and gives token numbers only",)
    stored = json.loads(file.read_text(encoding="utf-8"))
    model = stored["model"]
    if model.get("type") != "BPE" or not _is_byte_level(stored):
        raise ValueError(
            f"{file}: a tokenizer of type {model.get('type')} that is no byte-level BPE cannot be exported"
        )
    name = _word_rules(_steps(stored))
    if name is None:
        steps = json.dumps(_steps(stored))
        raise ValueError(f"{file} cuts words in a way that llama.cpp has no name for here: {steps}; {REMEDY}")
    if _changes_text(stored.get("normalizer")):
        normalizer = json.dumps(stored["normalizer"])
        raise ValueError(f"{file} changes text in a way that llama.cpp does not: normalizer {normalizer}; {REMEDY}")
    entries = [(index, token, gguf.TokenType.NORMAL) for token, index in model["vocab"].items()]
    for added in stored.get("added_tokens", []):
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        entries.append((added["id"], added["content"], special))
    largest = max((index for index, _, _ in entries), default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"{file} has a token {largest}, and the model's vocab_size={config.vocab_size} ends before it: "
            "put the tokenizer that the model was trained with there"
        )
    tokens = [f"[PAD{index}]" for index in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for index, token, type in entries:
        tokens[index], types[index] = token, type
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in model["merges"]])
    loaded: Any = load_tokenizer(str(directory))
    begins = config.bos_token_id if loaded.bos_token_id is None else loaded.bos_token_id
    ends = config.eos_token_id if loaded.eos_token_id is None else loaded.eos_token_id
    if begins is not None:
        writer.add_bos_token_id(begins)
    if ends is not None:
        writer.add_eos_token_id(ends[0] if isinstance(ends, list) else ends)
    if loaded.pad_token_id is not None:
        writer.add_pad_token_id(loaded.pad_token_id)
    writer.add_add_bos_token(begins is not None and loaded("a")["input_ids"][:1] == [begins])
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)
    return ()


def _steps(stored: dict[str, Any]) -> list[dict[str, Any]]:
    step = stored.get("pre_tokenizer") or {}
    return step["pretokenizers"] if step.get("type") == "Sequence" else [step]


def _is_byte_level(stored: dict[str, Any]) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(stored))


def _word_rules(steps: list[dict[str, Any]]) -> str | None:
    """llama.cpp's name of the rules by which exactly these steps cut words; None where it has none."""
    match [{"use_regex": True} | step for step in steps]:  # the value where a ByteLevel step says nothing
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if behavior == "Isolated" or (behavior == "Removed" and invert):  # the same, as every character is matched
            return SPLITS.get(words)
    return None


def _changes_text(normalizer: dict[str, Any] | None) -> bool:
    """Whether text is changed before it is cut. NFC, which Qwen2 has, may stay: most text is NFC before it is read."""
    if normalizer is None:
        return False
    if normalizer["type"] == "Sequence":
        return any(_changes_text(one) for one in normalizer["normalizers"])
    return normalizer["type"] != "NFC"
