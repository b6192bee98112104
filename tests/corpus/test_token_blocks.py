"""Token files and blocks against the tokenizer called on whole documents."""

from __future__ import annotations

import lzma
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerBase, Qwen2Config

from sparse_bitnet.corpus import token_blocks
from sparse_bitnet.corpus.documents import TextSource
from sparse_bitnet.corpus.token_blocks import StreamedBlocks, TokenBlocks, prepare_tokens, tokenize_text
from sparse_bitnet.corpus.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture
def source(corpus_file: Path) -> TextSource:
    return TextSource((str(corpus_file),))


@pytest.fixture
def expected(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def test_documents_are_joined_with_the_end_of_text(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, expected: list[int], documents: list[str], tmp_path: Path
) -> None:
    file = prepare_tokens(source, tokenizer, tmp_path)
    assert file.open().tolist() == expected
    assert file.bytes == sum(len(text.encode()) for text in documents)
    assert file.dtype == "uint16"


def test_long_documents_are_cut_at_line_ends_only(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(documents[:20])
    whole = tokenize_text(text, tokenizer)
    monkeypatch.setattr(token_blocks, "CHARACTERS_A_PIECE", 100)
    assert np.array_equal(tokenize_text(text, tokenizer), whole)
    assert len(tokenize_text("", tokenizer)) == 0


def test_blocks_do_not_overlap_and_leave_the_rest_out(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, expected: list[int], tmp_path: Path
) -> None:
    blocks = TokenBlocks(prepare_tokens(source, tokenizer, tmp_path), 33)
    assert len(blocks) == len(expected) // 33
    joined = torch.cat([blocks[index]["input_ids"] for index in range(len(blocks))])
    assert joined.tolist() == expected[: len(blocks) * 33]
    assert torch.equal(blocks[0]["labels"], blocks[0]["input_ids"])


def test_streamed_blocks_are_the_prepared_ones_over_and_over(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    prepared = TokenBlocks(prepare_tokens(source, tokenizer, tmp_path), 33)
    streamed = list(islice(StreamedBlocks(source, tokenizer, 33), len(prepared) + 2))
    for index, block in enumerate(streamed):
        assert torch.equal(block["input_ids"], prepared[index % len(prepared)]["input_ids"])


def test_a_token_file_is_made_once_and_again_when_a_file_changes(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = tmp_path / "a.txt"
    text.write_text(documents[0])
    first = prepare_tokens(TextSource((str(text),)), tokenizer, tmp_path / "cache")
    made = os.stat(first.directory / "tokens.bin").st_mtime_ns
    assert prepare_tokens(TextSource((str(text),)), tokenizer, tmp_path / "cache") == first
    assert os.stat(first.directory / "tokens.bin").st_mtime_ns == made
    text.write_text(documents[1] * 2)
    assert prepare_tokens(TextSource((str(text),)), tokenizer, tmp_path / "cache").directory != first.directory


def test_an_empty_corpus_is_refused_and_leaves_nothing(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    source = TextSource((str(tmp_path / "empty.jsonl"),))
    with pytest.raises(ValueError, match="the corpus is empty"):
        prepare_tokens(source, tokenizer, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    with pytest.raises(ValueError, match="fewer tokens than one block"):
        next(iter(StreamedBlocks(source, tokenizer, 8)))
    with pytest.raises(ValueError, match="the corpus is empty"):
        train_tokenizer(source.documents(), 300, 10**6)


def test_a_corpus_shorter_than_a_block_is_refused_with_both_lengths(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, expected: list[int], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{len(expected):,} tokens, fewer than one block of 1,000,000"):
        TokenBlocks(prepare_tokens(source, tokenizer, tmp_path), 10**6)


def test_a_trained_tokenizer_gives_the_text_back(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "the cat\n\tsat, ü 字 \U0001f642"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>"
    assert len(tokenizer) <= 320


def test_a_trained_tokenizer_means_the_same_to_transformers_and_to_us(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """AutoTokenizer puts a class of its own choice in place of the one that is stored, by the type of the model."""
    text = "It's 1234 o'clock\n\n  and DON'T,\t  the cat"
    tokenizer.save_pretrained(tmp_path)
    for config in (Qwen2Config(), LlamaConfig()):
        config.save_pretrained(tmp_path)
        for opened in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
            assert opened(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert opened.eos_token_id == tokenizer.eos_token_id


def test_an_existing_tokenizer_keeps_its_rules_beside_a_model_of_another_type(
    shared_data: Path, tmp_path: Path
) -> None:
    file = tmp_path / "gpt2.json"
    file.write_bytes(lzma.decompress((shared_data / "tokenizers" / "gpt2.tokenizer.json.xz").read_bytes()))
    gpt2, text = load_tokenizer(str(file)), "It's 1234 o'clock\n\n  and DON'T,\t  the cat"
    gpt2.save_pretrained(tmp_path)
    Qwen2Config().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))(text)["input_ids"] == gpt2(text)["input_ids"]


def test_a_vocabulary_below_the_bytes_is_refused(documents: list[str]) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=100 is below 257"):
        train_tokenizer(documents, 100, 10**6)


def test_a_tokenizer_opens_from_a_directory_or_a_file(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(source)).get_vocab() == tokenizer.get_vocab()


def test_no_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="no tokenizer could be read from") as refusal:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(refusal.value)


def test_real_tokenizers_round_trip_real_text(shared_data: Path, tmp_path: Path) -> None:
    text = next(TextSource((str(shared_data / "tinyshakespeare" / "input.txt.xz"),)).documents())[:100_000]
    for name in ("qwen2", "gpt2"):
        file = tmp_path / f"{name}.json"
        file.write_bytes(lzma.decompress((shared_data / "tokenizers" / f"{name}.tokenizer.json.xz").read_bytes()))
        tokenizer = load_tokenizer(str(file))
        assert tokenizer.decode(tokenize_text(text, tokenizer).tolist()) == text
