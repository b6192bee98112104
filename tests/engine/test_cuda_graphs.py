"""Writing as on a GPU, against transformers' own `generate`; without a GPU steps are called instead of replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_bitnet import Recipe, accelerate
from sparse_bitnet.engine.cuda_graphs import Sequences, obstacle, why_not_in_one_launch, write
from sparse_bitnet.engine.sampling import Sampling

Packed = Callable[..., tuple[Any, Path]]
PROMPT = [5, 17, 200, 3, 90, 41]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return request.param


def by_transformers(model: Any, prompt: list[int], new: int, **settings: Any) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0, **settings
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 128])
def test_greedy_text_is_that_of_transformers(packed: Packed, kind: str, length: int, device: str) -> None:
    model = packed(kind)[0].to(device)
    prompt = (22 * PROMPT)[:length]
    expected = by_transformers(model, prompt, 40, eos_token_id=None)
    assert len(set(expected)) > 1
    assert list(write(model, prompt, 40)) == expected
    model.set_attn_implementation("eager")
    assert list(write(model, prompt, 40)) == expected


def test_a_penalty_is_that_of_transformers(packed: Packed, device: str) -> None:
    model = packed()[0].to(device)
    expected = by_transformers(model, PROMPT, 40, eos_token_id=None, repetition_penalty=1.7)
    assert list(write(model, PROMPT, 40, Sampling(repetition_penalty=1.7))) == expected
    assert expected != by_transformers(model, PROMPT, 40, eos_token_id=None)


def test_a_seed_gives_its_text_again_and_the_likeliest_alone_is_greedy(packed: Packed, device: str) -> None:
    model = packed()[0].to(device)
    warm = Sampling(temperature=1.5, top_k=50, top_p=0.9, seed=3)
    texts = [list(write(model, PROMPT, 30, sampling)) for sampling in (warm, warm, Sampling(temperature=1.5, seed=4))]
    assert texts[0] == texts[1] != texts[2]
    assert list(write(model, PROMPT, 30, Sampling(temperature=1.5, top_k=1))) == list(write(model, PROMPT, 30))


def test_a_text_ends_at_a_stop_token(packed: Packed, device: str) -> None:
    model = packed()[0].to(device)
    text = list(write(model, PROMPT, 30))
    end = text[7]
    assert list(write(model, PROMPT, 30, stop=[end])) == text[: text.index(end) + 1]
    assert list(write(model, PROMPT, 0)) == []


def test_a_text_can_be_left_and_others_be_written_meanwhile(packed: Packed, device: str) -> None:
    model = packed()[0].to(device)
    text, before = list(write(model, PROMPT, 30)), model.config._attn_implementation
    tokens, others = write(model, PROMPT, 30), write(model, PROMPT, 30)
    for expected in text[:5]:
        assert next(tokens) == next(others) == expected
        assert model.config._attn_implementation == before
    assert by_transformers(model, PROMPT, 30) == text
    tokens.close()  # type: ignore[attr-defined]
    assert next(others) == text[5]
    others.close()  # type: ignore[attr-defined]
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0, 1, 1e-40])
def test_logits_that_are_no_numbers_are_refused(packed: Packed, device: str, bad: float, temperature: float) -> None:
    model = packed()[0].to(device)
    sampling = Sampling(temperature=temperature, repetition_penalty=2)
    assert len(list(write(model, PROMPT, 4, sampling))) == 4
    model.get_output_embeddings().weight.data[7] = bad
    with pytest.raises(ValueError, match="the logits are no numbers"):
        list(write(model, PROMPT, 4, sampling))


def test_what_cannot_be_is_told_at_once(packed: Packed, mixture_model: Callable[..., Any]) -> None:
    assert obstacle(packed()[0]) == "it writes on one GPU, and the model is on cpu"
    with pytest.raises(ValueError, match="the prompt is empty"):
        write(packed()[0], [], 4)
    with pytest.raises(ValueError, match="token 99999 is not in the vocabulary of 320"):
        write(packed()[0], [1, 99999], 4)
    with pytest.raises(ValueError, match="it knows qwen2, qwen3, llama, and the model is of the type qwen3_moe"):
        write(mixture_model(), PROMPT, 4)
    windowed = packed(use_sliding_window=True, sliding_window=16, max_window_layers=1)[0]
    with pytest.raises(ValueError, match="see a window of the text"):
        write(windowed, PROMPT, 4)
    dynamic = packed(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})[0]
    with pytest.raises(ValueError, match="rope_type 'dynamic' is none of"):
        write(dynamic, PROMPT, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_accelerated_model_writes_what_it_writes_call_by_call(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(recipe=Recipe("6:8"), hidden_size=256, intermediate_size=512)[0].to("cuda", torch.float16)
    accelerate(model, (1, 16), torch.float16)
    assert obstacle(model) is None
    by_graph = list(write(model, PROMPT, 40))
    monkeypatch.setattr(
        "sparse_bitnet.engine.cuda_graphs.Sequences.recorded_step",
        lambda self, token, position: self.begin(token, position) or self._called_step,
    )
    assert list(write(model, PROMPT, 40)) == by_graph


def in_one_launch(packed: Packed, kind: str = "qwen2") -> Any:
    """A model in bf16 whose layers are one launch."""
    size = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 576, "format": "i2"}
    model = packed(kind, Recipe("6:8"), **size)[0].to("cuda", torch.bfloat16)
    assert why_not_in_one_launch(model) is None
    return model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_accelerated", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@torch.no_grad()
def test_logits_in_one_launch_are_those_of_transformers(packed: Packed, kind: str, is_accelerated: bool) -> None:
    """Of a text that is given: rounded otherwise here and there, a greedy one would part sooner or later."""
    model = in_one_launch(packed, kind)
    if is_accelerated:
        accelerate(model, (1, 16))
    text = torch.randint(320, (1, 100), generator=torch.Generator().manual_seed(1)).cuda()
    expected = model(text).logits[0].float()
    work = Sequences(model, 1, 128)
    work.read(text[:, :40])
    step = work.recorded_step(text[:, 40:41], 40)
    torch.full((2**22,), float("nan"), device="cuda")  # what the graph reads must not be in memory that was let go
    for position in range(40, 100):
        work.token.copy_(text[:, position : position + 1])
        found = step()[0].float()
        assert int(work.position) == position + 1
        error = (found - expected[position]).norm() / expected[position].norm()
        assert error < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_texts_in_one_launch_do_not_mix(packed: Packed) -> None:
    model = in_one_launch(packed)
    prompts = [PROMPT, 40 * PROMPT, PROMPT[:1]]
    alone = [list(write(model, prompt, 60)) for prompt in prompts]
    assert [list(write(model, prompt, 60)) for prompt in prompts] == alone
    left = write(model, PROMPT, 60)
    together = [write(model, prompt, 60) for prompt in prompts]
    for count, tokens in enumerate(zip(*together, strict=True)):
        assert list(tokens) == [text[count] for text in alone]
        if count == 5:
            assert next(left) == alone[0][0]
            left.close()  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_is_not_one_launch_says_why(packed: Packed) -> None:
    model = in_one_launch(packed)
    assert Sequences(model, 2, 128).step_in_one_launch() == "it takes one sequence, and there are 2"
    assert why_not_in_one_launch(model.half()) == "torch.float16; it takes torch.bfloat16"
    assert why_not_in_one_launch(packed(recipe=Recipe("2:4"))[0].cuda()).endswith("`accelerate` keeps it in i2 too")  # type: ignore[union-attr]
