"""On a CUDA device: codes, scales and integer products of the CPU, under bf16 autocast and torch.compile too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedConfig

from sparse_bitnet import PackedLinear, Recipe, SparseBitLinear, StepWeights, convert, prepare
from sparse_bitnet.kernels.packed_linear.reference import integer_product
from sparse_bitnet.nn.experts import PackedExperts
from sparse_bitnet.nn.stored_settings import named_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("recipe", [Recipe("6:8"), Recipe("2:4"), Recipe("3:4", values="sign")], ids=str)
@pytest.mark.parametrize("parts", [(), (100, 200, 212)])
def test_codes_and_scales_equal_those_of_the_cpu(recipe: Recipe, parts: tuple[int, ...]) -> None:
    layer = SparseBitLinear(1024, 512, recipe=recipe, parts=parts)
    codes, scale = layer.quantize_weight()
    gpu_codes, gpu_scale = layer.cuda().quantize_weight()
    assert torch.equal(gpu_codes.cpu(), codes)
    assert torch.equal(gpu_scale.cpu(), scale)


def test_integer_products_are_exact() -> None:
    q = torch.randint(-128, 128, (64, 4096), dtype=torch.int8)
    codes = torch.randint(-1, 2, (512, 4096), dtype=torch.int8)
    expected = q.long() @ codes.long().T
    assert torch.equal(integer_product(q.cuda(), codes.cuda()).cpu().long(), expected)


def test_a_packed_layer_gives_what_the_cpu_gives() -> None:
    layer = PackedLinear.from_latent(SparseBitLinear(1024, 512))
    x = torch.randn(7, 1024)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), layer.cpu()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_bf16_keeps_fp32_masters_and_exports_the_codes_it_trained(compiled: bool) -> None:
    model = prepare(nn.Sequential(nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 64)), Recipe("6:8")).cuda()
    run = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    x, target = torch.randn(128, 256, device="cuda"), torch.randn(128, 64, device="cuda")
    losses = []
    for _ in range(50):
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.mse_loss(run(x).float(), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    trained = {name: layer.quantize_weight()[0] for name, layer in named_layers(model)}
    for name, layer in named_layers(convert(model)):
        assert torch.equal(layer.codes(), trained[name])


TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {"mixtral": MixtralConfig(**TINY, num_local_experts=4), "olmoe": OlmoeConfig(**TINY, num_experts=4)}


@pytest.mark.parametrize("config", MIXTURES.values(), ids=MIXTURES)
def test_a_mixture_trains_and_writes_as_on_the_cpu(config: PreTrainedConfig) -> None:
    model = prepare(AutoModelForCausalLM.from_config(config, dtype=torch.float32), Recipe("6:8"))
    ids = torch.randint(64, (8, 32))
    expected = model(ids).logits
    torch.testing.assert_close(copy.deepcopy(model).cuda()(ids.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    model = model.cuda()
    step_weights = StepWeights(model, torch.bfloat16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(60):
        step_weights.refresh()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids.cuda(), labels=ids.cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    step_weights.release()
    trained = {name: layer.quantize_weight()[0] for name, layer in named_layers(model)}
    packed = convert(model.eval())
    assert sum(isinstance(module, PackedExperts) for module in packed.modules()) == 2
    for name, layer in named_layers(packed):
        assert torch.equal(layer.codes(), trained[name])
    on_gpu = packed(ids.cuda()).logits.cpu()
    torch.testing.assert_close(packed.cpu()(ids).logits, on_gpu, rtol=1e-3, atol=1e-3)
