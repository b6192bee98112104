"""Text as it becomes certain: whole characters, and nothing that a stop string may still take back."""

from __future__ import annotations

import lzma
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from sparse_bitnet.serving.text import TextStream

TEXT = "naïve façade 日本語のテキスト 👩‍👩‍👧‍👦 ﷽ \ufffd and so on"


def streamed(stream: TextStream, tokens: list[int]) -> list[str]:
    pieces = []
    for token in tokens:
        pieces.append(stream.put(token))
        if stream.is_stopped:
            return pieces
    return [*pieces, stream.end()]


@pytest.fixture
def bytewise(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """One that knows English words alone: other letters are 2 to 4 tokens."""
    return tokenizer.backend_tokenizer


def test_characters_come_whole(bytewise: Tokenizer) -> None:
    tokens = bytewise.encode(TEXT).ids
    assert len(tokens) > len(TEXT)
    pieces = streamed(TextStream(bytewise), tokens)
    assert "".join(pieces) == TEXT
    assert [piece for piece in pieces if "\ufffd" in piece] == ["\ufffd and"]  # held until it is no half
    cut = streamed(TextStream(bytewise), bytewise.encode("ab日").ids[:-1])
    assert "".join(cut) == "ab"


def test_bytes_that_are_no_text_cost_nothing_but_themselves(bytewise: Tokenizer) -> None:
    generator = random.Random(0)
    for _ in range(200):
        tokens = [generator.randrange(bytewise.get_vocab_size()) for _ in range(40)]
        text = bytewise.decode(tokens)
        found = "".join(streamed(TextStream(bytewise), tokens))
        assert text.startswith(found)
        assert set(text[len(found) :]) <= {"\ufffd"}


def test_stop_strings_are_found_wherever_they_lie(bytewise: Tokenizer) -> None:
    """Beside a search in the whole text, with random stops cut out of it and ones that almost come."""
    generator = random.Random(1)
    words = "the cat sat on the mat and the dog ran"
    tokens = bytewise.encode(words + TEXT).ids
    text = words + TEXT
    for _ in range(300):
        stops = []
        for _ in range(generator.randint(1, 3)):
            start = generator.randrange(len(text))
            stop = text[start : start + generator.randint(1, 9)]
            stops.append(stop + "~" if generator.random() < 0.4 else stop)
        stream = TextStream(bytewise, stops)
        found = "".join(streamed(stream, tokens))
        ends = [text.index(stop) for stop in stops if stop in text]
        assert stream.is_stopped == bool(ends)
        if not ends:
            assert found == text
        else:  # of two that come with one token, the first in the text counts
            assert found == text[: len(found)]
            assert len(found) in ends


def test_what_may_be_a_stop_is_held_back_and_no_more(bytewise: Tokenizer) -> None:
    stream = TextStream(bytewise, ["</end>"])
    pieces = [stream.put(token) for token in bytewise.encode("a</e</en").ids]
    assert "".join(pieces) == "a</e"
    assert stream.end() == "</en"
    assert stream.end() == ""


def test_a_text_that_goes_on_begins_as_it_would_in_one_piece(shared_data: Path) -> None:
    """GPT-2's tokens hold their spaces, those of a metaspace only in the middle of a text."""
    with lzma.open(shared_data / "tokenizers" / "gpt2.tokenizer.json.xz", "rt", encoding="utf-8") as file:
        gpt2 = Tokenizer.from_str(file.read())
    tokens = gpt2.encode("Once upon a time").ids
    assert "".join(streamed(TextStream(gpt2, before=tokens[:1]), tokens[1:])) == " upon a time"


def test_a_metaspace_is_a_space_after_a_prompt() -> None:
    tokenizer = Tokenizer(models.WordLevel({"▁once": 0, "▁upon": 1}, unk_token="▁once"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert "".join(streamed(TextStream(tokenizer, before=[0]), [1])) == " upon"
    assert "".join(streamed(TextStream(tokenizer), [1])) == "upon"


@pytest.fixture
def byte_fallback() -> Tokenizer:
    """As SentencePiece's of Llama: tokens 0 to 255 are bytes, then two words."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁cat": 256, "s": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def test_a_byte_that_is_no_text_takes_nothing_back(byte_fallback: Tokenizer) -> None:
    """Decoded at once it spoils the bytes before it, which were told already."""
    tokens = [*"日A".encode(), 0xFF, 0xE6, 256, *"é".encode(), 0xC3, 257, 256]
    assert byte_fallback.decode(tokens) == "\ufffd" * 6 + " cat" + "\ufffd" * 3 + "s cat"
    assert streamed(TextStream(byte_fallback), tokens) == [
        "", "", "日", "A", "", "", "\ufffd\ufffd cat", "", "é", "", "\ufffds", " cat", "",
    ]  # fmt: skip


def test_a_character_that_a_prompt_leaves_half_tells_nothing_again(byte_fallback: Tokenizer) -> None:
    half = "日".encode()
    assert "".join(streamed(TextStream(byte_fallback, before=[257, *half[:2]]), [half[2], 257])) == "\ufffds"
    assert "".join(streamed(TextStream(byte_fallback, before=[half[2], *half]), [*half, 257])) == "日s"


def test_any_bytes_can_be_streamed_by_a_byte_fallback(byte_fallback: Tokenizer) -> None:
    """All words come, in their order, and what is text between them comes as it is."""
    generator = random.Random(2)
    for _ in range(500):
        tokens = [generator.choice([generator.randrange(128, 256), *"aé日", 256, 257]) for _ in range(40)]
        tokens = [token for part in tokens for token in ([part] if isinstance(part, int) else part.encode())]
        before = tokens[:3] if generator.random() < 0.5 else []
        found = "".join(streamed(TextStream(byte_fallback, before=before), [*tokens, 257]))
        assert [c for c in found if c in "cs"] == [
            "c" if token == 256 else "s" for token in [*tokens, 257] if token > 255
        ]
        whole = byte_fallback.decode([*tokens, 257])
        assert len(found.replace("\ufffd", "")) >= len(whole.replace("\ufffd", "").strip())
