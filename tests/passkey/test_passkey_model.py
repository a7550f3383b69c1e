"""The small model is transformers' Llama under the pattern, packed or not, and its export loads there."""

import json

import pytest
import torch
from support.oracle import under_oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_power.pattern import preset
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.demo import passkeys
from vllm_power.tools.passkey.export import export
from vllm_power.tools.passkey.packing import Packing, pack, tile_mask
from vllm_power.tools.passkey.settings import GPU
from vllm_power.tools.passkey.small_model import Sizes, SmallModel, rotation_at

SIZES = Sizes(len(data.WORDS), width=64, layers=2, heads=4, kv_heads=2, ffn=96)
CPU = torch.device("cpu")


@pytest.fixture
def model() -> SmallModel:
    made = SmallModel(SIZES, torch.Generator().manual_seed(0))
    for name, weight in made.named_parameters():
        if weight.dim() == 1:  # norms, which start at 1
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    # What an export keeps, so that both compute with the same weights.
    return made.bfloat16().float()


def documents(length: int, count: int = 2) -> torch.Tensor:
    return data.sample(count, length, torch.Generator().manual_seed(1)).tokens


@pytest.mark.parametrize("name", ["power", "sliding_window", "stride_slash", "dilated", "longnet"])
def test_logits_are_those_of_transformers(model, name, tmp_path):
    pattern = preset(name, block_size=16)
    export(model, pattern, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = documents(1_000 if name == "sliding_window" else 700)
    packing = pack(pattern, *tokens.shape, SIZES, CPU)
    with torch.no_grad(), under_oracle(theirs, pattern):
        ours = model(tokens, packing.rotation, packing.mask)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(
            ours, model(tokens, packing.rotation, preset("full", block_size=16)), atol=1e-2
        )


def test_the_export_says_what_it_was_trained_under(model, tmp_path):
    export(model, preset("power", block_size=32), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["power_attention"] == {"pattern": "power", "block_size": 32}
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokens = documents(200)[0]
    assert AutoTokenizer.from_pretrained(tmp_path)(data.text(tokens))["input_ids"] == tokens.tolist()


def test_a_trained_model_fits_into_a_repository():
    with torch.device("meta"):
        weights = SmallModel(GPU.sizes).parameters()
    assert sum(weight.numel() for weight in weights) * 2 <= 12 * 2**20
    assert (passkeys.MODEL / "model.safetensors").stat().st_size < 2**20


@pytest.mark.slow
def test_documents_packed_into_one_row_see_only_themselves(model):
    """FlexAttention as it is compiled for a CPU. One compiled layer serves all patterns and lengths."""
    compiled = []

    def packed(pattern, count: int, length: int) -> Packing:
        positions = torch.arange(length).repeat(count)
        mask = tile_mask(pattern, count, length, 16, CPU)
        return Packing(count, length, 1, mask, rotation_at(positions, SIZES))

    def backend(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        compiled.append(graph)
        return compile_fx(graph, inputs)

    plain = SmallModel(SIZES)
    plain.load_state_dict(model.state_dict())
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    with torch.no_grad():
        for name, block_size, count, length in [
            ("power", 16, 4, 256),
            ("power", 32, 1, 1_024),
            ("longnet", 32, 2, 512),
        ]:
            pattern = preset(name, block_size=block_size)
            tokens = documents(length, count)
            rows, row = pack(pattern, count, length, SIZES, CPU), packed(pattern, count, length)
            expected = plain.model(tokens, rows.rotation, rows.mask)
            states = model.model(tokens.view(1, -1), row.rotation, row.mask).view_as(expected)
            torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)
    assert len(compiled) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["power", "dilated", "longnet"])
def test_training_on_a_gpu_computes_what_the_cpu_does(model, name):
    pattern, tokens = preset(name, block_size=128), documents(2_048, 2)
    rows = pack(pattern, *tokens.shape, SIZES, CPU)
    expected = model.model(tokens, rows.rotation, rows.mask)
    direction = torch.randn(SIZES.width, generator=torch.Generator().manual_seed(2))
    (expected @ direction).mean().backward()
    gradients = [weight.grad.clone() for weight in model.model.layers.parameters()]

    model.zero_grad()
    gpu = torch.device("cuda")
    model.to(gpu)
    for layer in model.model.layers:
        layer.compile(fullgraph=True)
    row = pack(pattern, *tokens.shape, SIZES, gpu)
    states = model.model(tokens.to(gpu).view(1, -1), row.rotation, row.mask).view_as(expected)
    (states @ direction.to(gpu)).mean().backward()
    torch.testing.assert_close(states.cpu(), expected, atol=1e-3, rtol=1e-3)
    for weight, gradient in zip(model.model.layers.parameters(), gradients, strict=True):
        torch.testing.assert_close(
            weight.grad.cpu(), gradient, atol=1e-3 * float(gradient.abs().max()), rtol=1e-2
        )


def test_tiles_must_fit():
    with pytest.raises(ValueError, match="whole tiles of 128"):
        tile_mask(preset("power", block_size=64), 1, 1_024, 128, CPU)
    with pytest.raises(ValueError, match="documents of 200"):
        tile_mask(preset("power", block_size=128), 1, 200, 128, CPU)
