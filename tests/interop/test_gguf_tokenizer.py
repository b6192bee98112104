"""Tokenizers in GGUF files: each under the name by which llama.cpp cuts words as it does, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from interop.llama_cpp import llama_cpp, needs_llama
from sparse_bitnet import convert
from sparse_bitnet.corpus.tokenizer import load_tokenizer
from sparse_bitnet.interop.gguf import export_gguf
from sparse_bitnet.interop.gguf_tokenizer import WORDS, add_tokenizer

TEXT = "It's 1234 cats and 5678 dogs,  said the  old man's 12 sons in 1999\n\n  and 2024."
CONFIG = Qwen2Config(vocab_size=400, bos_token_id=0, eos_token_id=0)


def byte_level(use_regex: bool = True, add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split(expression: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(expression), behavior, invert)


def steps(*several: Any) -> Any:
    return pre_tokenizers.Sequence(list(several))


QWEN2, LLAMA = WORDS % "", WORDS % "{1,3}"
KNOWN = {
    "gpt-2": byte_level(),
    "smollm": steps(pre_tokenizers.Digits(individual_digits=True), byte_level()),
    "qwen2": steps(split(QWEN2), byte_level(use_regex=False)),
    "llama-bpe": steps(split(LLAMA), byte_level(use_regex=False)),
}


def write(directory: Path, cut: Any, normalizer: Any = None) -> Path:
    """A BPE into the directory that has learnt numbers and spaces as they come, whatever `cut` makes of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = steps(split(r"[\w']+|\s+"), byte_level(use_regex=False))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory


def name_of(directory: Path, config: Any = CONFIG) -> str:
    writer = gguf.GGUFWriter(None, "qwen2")
    assert add_tokenizer(writer, directory, config) == ()
    return writer.kv_data[0]["tokenizer.ggml.pre"].value


@needs_llama
@pytest.mark.parametrize("name", KNOWN)
def test_llama_cpp_cuts_words_as_the_tokenizer_does(
    name: str, latent_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    packed = convert(latent_model(vocab_size=400))
    packed.save_pretrained(tmp_path / "packed")
    write(tmp_path / "packed", KNOWN[name])
    export_gguf(str(tmp_path / "packed"), tmp_path / "model.gguf")
    tokenizer = load_tokenizer(str(tmp_path / "packed"))
    with llama_cpp(tmp_path / "model.gguf") as ask:
        by_text, by_ids = ask(TEXT), ask(tokenizer(TEXT)["input_ids"])
    assert by_text["prompt_tokens"] == len(tokenizer(TEXT)["input_ids"])
    assert by_text["top_logprobs"] == by_ids["top_logprobs"]


def test_forms_of_the_same_rules_have_the_same_name(tmp_path: Path) -> None:
    for name, cut in KNOWN.items():
        assert name_of(write(tmp_path / name, cut)) == name
    assert name_of(write(tmp_path / "sequence", steps(byte_level()))) == "gpt-2"
    removed = steps(split(LLAMA, "removed", invert=True), byte_level(use_regex=False))
    assert name_of(write(tmp_path / "removed", removed)) == "llama-bpe"
    file = write(tmp_path / "old", byte_level()) / "tokenizer.json"
    stored = json.loads(file.read_text())
    del stored["pre_tokenizer"]["use_regex"]  # as files were written before the setting was
    file.write_text(json.dumps(stored))
    assert name_of(tmp_path / "old") == "gpt-2"
    for normalizer in (normalizers.NFC(), normalizers.Sequence([]), normalizers.Sequence([normalizers.NFC()])):  # type: ignore
        assert name_of(write(tmp_path / "normalizer", KNOWN["qwen2"], normalizer)) == "qwen2"


@pytest.mark.parametrize(
    "cut",
    [
        byte_level(use_regex=False),
        byte_level(add_prefix_space=True),
        steps(pre_tokenizers.Digits(individual_digits=False), byte_level()),
        steps(pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=False)),
        steps(split(QWEN2), byte_level()),
        steps(split(QWEN2), byte_level(use_regex=False, add_prefix_space=True)),
        steps(split(QWEN2), split(r"\d"), byte_level(use_regex=False)),
        steps(split(QWEN2, "removed"), byte_level(use_regex=False)),
        steps(split(r"\w+"), byte_level(use_regex=False)),
        steps(pre_tokenizers.Punctuation(), byte_level()),
    ],
)
def test_rules_that_llama_cpp_has_no_name_for_are_refused(cut: Any, tmp_path: Path) -> None:
    directory = write(tmp_path, cut)
    message = r"tokenizer.json cuts words in a way that llama.cpp has no name for here: \[.*without this file"
    with pytest.raises(ValueError, match=message) as caught:
        name_of(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Lowercase(),
        normalizers.NFKC(),
        normalizers.Replace("a", "b"),
        normalizers.Sequence([normalizers.NFC(), normalizers.Strip()]),  # type: ignore[list-item]
    ],
    ids=str,
)
def test_a_normalizer_that_changes_text_is_refused(normalizer: Any, tmp_path: Path) -> None:
    directory = write(tmp_path, KNOWN["qwen2"], normalizer)
    with pytest.raises(ValueError, match=r"changes text in a way that llama.cpp does not: normalizer .*without this"):
        name_of(directory)


def test_a_token_beyond_the_vocabulary_of_the_model_is_refused(tmp_path: Path) -> None:
    directory = write(tmp_path, KNOWN["qwen2"])
    tokens = len(load_tokenizer(str(directory)))
    name_of(directory, Qwen2Config(vocab_size=tokens, bos_token_id=0, eos_token_id=0))
    small = Qwen2Config(vocab_size=tokens - 1, bos_token_id=0, eos_token_id=0)
    with pytest.raises(ValueError, match=f"has a token {tokens - 1}, and the model's vocab_size={tokens - 1} ends"):
        name_of(directory, small)
    file = directory / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["added_tokens"].append({**stored["added_tokens"][0], "id": 400, "content": "<|more|>"})
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="has a token 400, and the model's vocab_size=400 ends before it"):
        name_of(directory)
