"""Tokenizers: an existing one by name, directory or file, or a byte-level BPE trained on the text at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 256 + 1  # every byte, and the end of text


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hub id, a model directory or a `tokenizer.json`; ValueError where there is none."""
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(path))
        return AutoTokenizer.from_pretrained(str(path) if path.exists() else source)
    except Exception as error:  # tokenizers raises bare Exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no tokenizer could be read from {source}: {reason}") from error


def train_tokenizer(documents: Iterable[str], vocab_size: int, sample_bytes: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries, trained on the first `sample_bytes` of the documents.

    ValueError where there is no text, or where the vocabulary cannot hold all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"tokenizer.vocab_size={vocab_size} is below {SMALLEST_VOCABULARY}, which all bytes need")
    sample = list(_head(documents, sample_bytes))
    if not sample:
        raise ValueError("the corpus is empty: there is no text to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def _head(documents: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """Documents up to `sample_bytes` in all, the last one cut off there."""
    left = sample_bytes
    for document in documents:
        if left <= 0:
            return
        yield document[:left]
        left -= len(document)
