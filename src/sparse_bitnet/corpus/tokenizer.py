"""Tokenizers: an existing one by name, directory or file, or a byte-level BPE trained on the text at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from sparse_bitnet.checkpoint.directory import is_no_hub_id

TOKENIZER_FILE = "tokenizer.json"
SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id, a model directory or a `tokenizer.json`; ValueError where there is none.

    A `tokenizer.json` is taken as it is: AutoTokenizer may replace its rules by those usual for the type of the model.
    """
    path = Path(source).expanduser()
    if not path.exists() and is_no_hub_id(source):
        raise ValueError(f"no tokenizer could be read from {source}: no such file or directory")
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        if (path / TOKENIZER_FILE).exists():
            return PreTrainedTokenizerFast.from_pretrained(str(path))
        tokenizer = AutoTokenizer.from_pretrained(str(path) if path.exists() else source)
        if tokenizer.vocab_size <= 1:  # what it makes for a model type that it knows, where there are no files
            raise ValueError("there are no files of a tokenizer: copy the model's tokenizer.json there")
        return tokenizer
    except Exception as error:  # tokenizers raises bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no tokenizer could be read from {source}: {reason}") from error


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, with_special: bool = True) -> list[int]:
    """Of a text to go on from; an empty one begins a document. ValueError where no token of the tokenizer does that.

    `with_special=False` is for a text that holds the tokens of its beginning already, as a chat template writes it.
    """
    ids: Any = tokenizer(text, add_special_tokens=with_special)["input_ids"]
    begin: Any = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not ids and begin is None:
        raise ValueError("the tokenizer has no token that begins a text: give a prompt")
    return ids or [begin]


def train_tokenizer(documents: Iterable[str], vocab_size: int, sample_bytes: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of at most `vocab_size` entries, trained on the first `sample_bytes` of the documents.

    Text is cut into words as Qwen2's tokenizer cuts it, which is what AutoTokenizer does for a model of that type,
    whatever the file says. ValueError where there is no text, or where the vocabulary cannot hold all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"tokenizer.vocab_size={vocab_size} is below {SMALLEST_VOCABULARY}, which all bytes need")
    sample = list(_head(documents, sample_bytes))
    if not sample:
        raise ValueError("the corpus is empty: there is no text to train a tokenizer on")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return Qwen2Tokenizer().train_new_from_iterator(sample, vocab_size, initial_alphabet=alphabet, show_progress=False)


def _head(documents: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """Documents up to `sample_bytes` in all, the last one cut off there."""
    left = sample_bytes
    for document in documents:
        if left <= 0:
            return
        yield document[:left]
        left -= len(document)
