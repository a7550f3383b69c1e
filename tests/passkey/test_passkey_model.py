"""The small model: its first weights, what is exported, and a compiled step on a GPU against the CPU's."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.oracle import under_oracle
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_power.pattern import NAMES, preset
from vllm_power.tools.adapt.engine import compile_layers, hidden_states
from vllm_power.tools.common import passkey_data as data
from vllm_power.tools.demo import passkeys
from vllm_power.tools.passkey.documents import Collator, Documents
from vllm_power.tools.passkey.model import export, new_model
from vllm_power.tools.passkey.settings import GPU, Settings, Stage
from vllm_power.tools.passkey.train import Planners, Student

SMALL = Settings(width=64, layers=2, heads=4, kv_heads=2, ffn=96, block_size=16)


def documents(length: int, count: int = 2) -> torch.Tensor:
    return data.sample(count, length, torch.Generator().manual_seed(1)).tokens


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"full"}))
def test_students_run_under_the_pattern(name: str) -> None:
    """And under the size of blocks that a batch names."""
    student = Student(replace(SMALL, pattern=name), torch.float32).eval()
    tokens = documents(420, 1)
    plain = new_model(SMALL)
    with torch.no_grad():
        for block_size in (16, 32):
            student._run_under(block_size)
            ours = student.model.lm_head(hidden_states(student.model, input_ids=tokens))
            with under_oracle(plain, preset(name, block_size=block_size)):
                torch.testing.assert_close(ours, plain(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_first_weights_depend_on_the_seed_alone() -> None:
    one, same, other = (new_model(replace(SMALL, seed=seed)).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one["model.embed_tokens.weight"].std().item() == pytest.approx(1, rel=0.05)
    assert one["model.layers.1.mlp.down_proj.weight"].std().item() == pytest.approx(
        (4 * 96) ** -0.5, rel=0.05
    )


def test_the_export_says_what_it_was_trained_under(tmp_path: Path) -> None:
    model = new_model(SMALL)
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    export(model, SMALL.options(32), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["power_attention"] == {"pattern": "power", "block_size": 32}
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokens = documents(200)[0]
    assert AutoTokenizer.from_pretrained(tmp_path)(data.text(tokens))["input_ids"] == tokens.tolist()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_a_trained_model_fits_into_a_repository() -> None:
    assert sum(weight.numel() for weight in new_model(GPU).parameters()) * 2 <= 12 * 2**20
    assert (passkeys.MODEL / "model.safetensors").stat().st_size < 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["power", "dilated", "longnet"])
@pytest.mark.parametrize("block_size", [32, 128])
def test_a_compiled_step_on_a_gpu_is_the_cpus(name: str, block_size: int) -> None:
    settings = replace(SMALL, pattern=name, block_size=block_size, tokens=16 * block_size)
    settings = replace(settings, curriculum=(Stage(0.5, (8,)), Stage(1.0, (16,))))
    rows = Documents(settings)
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        student = Student(settings, torch.float32).to(device)
        planners = None
        if device.type == "cuda":
            planners = Planners(settings, student.model.config, torch.float32)
            compile_layers(student.model)
        batch = Collator(settings.row, planners)([rows[0]])
        moved = {key: part if key == "block_size" else part.to(device) for key, part in batch.items()}
        output = student(**moved)
        output["loss"].backward()
        results.append([output["loss"], *(weight.grad for weight in student.model.parameters())])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=2e-3 * float(theirs.abs().max()), rtol=1e-2)
