"""The engine beside transformers on the same checkpoint: logits, texts, and what happens at the edges."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from sparse_bitnet import PackedLinear, Recipe, convert
from sparse_bitnet.engine.sampling import Sampling

pytest.importorskip("sparse_bitnet._native", reason="the native kernels are not built")

from sparse_bitnet.engine.batch import CHUNK
from sparse_bitnet.engine.decoder import Decoder
from sparse_bitnet.kernels.packed_linear.cpu_native import CPU_VARIABLE, instruction_sets

Packed = Callable[..., tuple[PreTrainedModel, Path]]
RECIPES = {
    "i2": Recipe("6:8"),
    "g4": Recipe("2:4"),
    "g4s2": Recipe("2:4", values="sign"),
    "g4s3": Recipe("3:4", values="sign"),
    "int4": Recipe("6:8", activations="int4"),
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 24}),
    ("qwen3", {"tie_word_embeddings": False, "head_dim": 32, "attention_bias": True}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
]


def ids_of(length: int) -> list[int]:
    return torch.randint(320, (length,)).tolist()


def assert_same_logits(ours: Tensor, model: PreTrainedModel, ids: list[int]) -> None:
    """In units of the logits' deviation: 1e-5 for most tokens, where both differ by the order of fp32 sums alone.

    Where an activation lies on the edge between two integers, that order decides, and one code of int8 or int4 is
    another. transformers differs from itself in fp64 by up to 3.4e-3 for that reason on such models with int8.
    """
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    error = (ours - expected).abs().amax(-1) / expected.std()
    flip = 0.08 if next(layers(model)).recipe.activations == "int4" else 0.01
    assert error.median() < 1e-5, error
    assert error.max() < flip, error


def layers(model: PreTrainedModel) -> Any:
    return (module for module in model.modules() if isinstance(module, PackedLinear))


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize(("kind", "settings"), MODELS)
def test_the_logits_are_those_of_transformers(
    packed: Packed, kind: str, settings: dict[str, Any], instruction_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CPU_VARIABLE, instruction_set)
    model, directory = packed(kind, **settings)
    ids = ids_of(77)
    assert_same_logits(Decoder(directory, head="stored").logits(ids), model, ids)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_format_is_decoded(packed: Packed, recipe: str) -> None:
    model, directory = packed(recipe=RECIPES[recipe])
    ids = ids_of(40)
    assert_same_logits(Decoder(directory, head="stored").logits(ids), model, ids)


def test_t5_is_decoded(latent_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model = convert(latent_model(), format="t5").eval()
    model.save_pretrained(tmp_path / "t5")
    ids = ids_of(40)
    assert_same_logits(Decoder(tmp_path / "t5", head="stored").logits(ids), model, ids)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
)  # fmt: skip
def test_scaled_rotary_embeddings(packed: Packed, rope: dict[str, Any]) -> None:
    model, directory = packed("llama", rope_parameters=rope)
    ids = ids_of(90)
    assert_same_logits(Decoder(directory, head="stored").logits(ids), model, ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_in_16_bits(packed: Packed, dtype: torch.dtype, tmp_path: Path) -> None:
    """Stored floats are read as they are and computed in fp32, as transformers does when asked for fp32."""
    model, _ = packed(tie_word_embeddings=True)
    model.to(dtype).save_pretrained(tmp_path / "half")
    ids = ids_of(20)
    assert_same_logits(Decoder(tmp_path / "half", head="stored").logits(ids), model.float(), ids)


def test_an_int8_head_rounds_its_weights_and_nothing_else(packed: Packed) -> None:
    """Its logits are those of weights in 127 steps a row; the rounding of hidden states is not to be seen."""
    _, directory = packed(tie_word_embeddings=True)
    ids = ids_of(60)
    exact, rounded = (Decoder(directory, head=head).logits(ids) for head in ("stored", "int8"))
    error = (rounded - exact) / exact.std()
    assert error.pow(2).mean().sqrt() < 0.01
    assert error.abs().max() < 0.05
    table = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    steps = table.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127  # of the row of padding, which is zero
    normed = exact @ torch.linalg.pinv(table).T  # the states behind these logits, 320 equations for 64 numbers
    expected = normed @ ((table / steps).round() * steps).T
    assert (rounded - expected).abs().max() < 1e-3 * exact.std()


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_is_the_same_bit_for_bit_however_it_is_cut(
    packed: Packed, instruction_set: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, token by token, beside others, and longer than the span of positions and the chunk of a prompt."""
    monkeypatch.setenv(CPU_VARIABLE, instruction_set)
    _, directory = packed("qwen3", head_dim=24)
    decoder = Decoder(directory, threads=threads)
    ids, other = ids_of(2 * CHUNK + 30), ids_of(40)
    whole = decoder.logits(ids)
    cache, beside = decoder.new_cache(len(ids)), decoder.new_cache(len(ids))
    first = decoder.forward([cache, beside], [ids[:300], other], every=True)
    assert torch.equal(first[:300], whole[:300])
    assert torch.equal(first[300:], decoder.logits(other))
    for position in range(300, 320):
        rows = decoder.forward([cache, beside], [[ids[position]], [7]])
        assert torch.equal(rows[0], whole[position])
    assert torch.equal(decoder.forward([cache], [ids[320:]], every=True), whole[320:])


def test_greedy_text_is_that_of_transformers(packed: Packed) -> None:
    model, directory = packed(tie_word_embeddings=True)
    decoder = Decoder(directory, head="stored")
    for length in (1, 9, 50):
        prompt = ids_of(length)
        written = [token for _, token in decoder.generate([prompt], 40)]
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None)
        assert written == expected[0, length:].tolist()


def test_sequences_side_by_side_are_as_they_are_alone(packed: Packed) -> None:
    _, directory = packed()
    decoder = Decoder(directory)
    sampling = Sampling(temperature=0.9, top_k=20, top_p=0.95, repetition_penalty=1.1, seed=5)
    prompts = [ids_of(length) for length in (3, 600, 17)]
    together: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for number, token in decoder.generate(prompts, 25, sampling):
        together[number].append(token)
    for number, prompt in enumerate(prompts):
        assert together[number] == [token for _, token in decoder.generate([prompt], 25, sampling)]
        assert len(together[number]) == 25


def test_a_text_ends_at_a_stop_token_and_leaves_room(packed: Packed) -> None:
    _, directory = packed()
    decoder = Decoder(directory)
    assert decoder.end_tokens == {0}
    prompts = [ids_of(5), ids_of(6)]
    alone = [[token for _, token in decoder.generate([prompt], 12)] for prompt in prompts]
    stop = alone[0][3]
    together: dict[int, list[int]] = {0: [], 1: []}
    for number, token in decoder.generate(prompts, 12, stop=[stop]):
        together[number].append(token)
    for number in (0, 1):
        length = alone[number].index(stop) + 1 if stop in alone[number] else 12
        assert together[number] == alone[number][:length]


def test_writing_can_be_left_and_taken_up_again(packed: Packed) -> None:
    _, directory = packed()
    decoder = Decoder(directory)
    prompt = ids_of(8)
    text = [token for _, token in decoder.generate([prompt], 10)]
    begun = decoder.generate([prompt], 10)
    assert [next(begun)[1] for _ in range(4)] == text[:4]
    begun.close()
    left = decoder.generate([prompt], 10)
    next(left)
    del left, begun
    gc.collect()
    assert [token for _, token in decoder.generate([prompt], 10)] == text
    assert list(decoder.generate([prompt], 0)) == []
    assert list(decoder.generate([], 5)) == []


def test_a_prompt_fills_the_context_and_no_more(packed: Packed) -> None:
    _, directory = packed(max_position_embeddings=40)
    decoder = Decoder(directory)
    assert len(list(decoder.generate([ids_of(30)], 10))) == 10
    with pytest.raises(ValueError, match=r"^31 tokens of prompt and 10 new ones exceed the model's context of 40$"):
        decoder.generate([ids_of(30), ids_of(31)], 10)
    with pytest.raises(ValueError, match="41 tokens of prompt and 0 new ones exceed"):
        decoder.logits(ids_of(41))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty: give at least one token"),
        ([3, 320], "token 320 is not in the vocabulary of 320"),
        ([-1], "token -1 is not in the vocabulary"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused_at_once(packed: Packed, prompt: list[int], message: str) -> None:
    decoder = Decoder(packed()[1])
    with pytest.raises(ValueError, match=message):
        decoder.generate([[1], prompt], 3)


def test_the_native_model_refuses_what_it_has_no_room_for(packed: Packed) -> None:
    """It does not rely on its caller: the caches are left as they were."""
    decoder = Decoder(packed()[1])
    cache = decoder.new_cache(4)
    decoder.forward([cache], [[1, 2]])
    with pytest.raises(ValueError, match="a sequence of 2 tokens and 3 more exceed the 4 that it was made for"):
        decoder.forward([cache], [[1, 2, 3]])
    with pytest.raises(ValueError, match="token 320 is not in the vocabulary"):
        decoder.forward([cache], [[320]])
    with pytest.raises(ValueError, match="a sequence has no tokens to go on by"):
        decoder.forward([cache, decoder.new_cache(4)], [[], [1]])
    with pytest.raises(ValueError, match="a sequence is given twice"):
        decoder.forward([cache, cache], [[1], [1]])
    assert cache.length == 2
    decoder.forward([cache], [[3, 4]])
    assert cache.length == 4


def test_threads_decode_at_the_same_time_without_the_lock(packed: Packed) -> None:
    decoder = Decoder(packed()[1], threads=2)
    prompts = [ids_of(length) for length in (5, 40, 300)]
    expected = [decoder.logits(prompt) for prompt in prompts]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        for _ in range(5):
            found[number] = decoder.logits(prompts[number])

    workers = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(3))


def test_packed_weights_stay_in_the_file(packed: Packed) -> None:
    """Their addresses lie in the mapping of the file, and so does a head that is stored."""
    _, directory = packed(tie_word_embeddings=True)
    decoder = Decoder(directory, head="stored")
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]
    mapped = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]
    assert len(decoder.matrices) == 2 * 7 + 1
    for matrix in decoder.matrices:
        assert any(start <= matrix.data_ptr() < end for start, end in mapped)


@pytest.mark.parametrize(("options", "message"), [({"head": "int3"}, "head='int3' is none"), ({"threads": 0}, "1 or")])
def test_an_option_that_is_none_is_refused(packed: Packed, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(packed()[1], **options)
