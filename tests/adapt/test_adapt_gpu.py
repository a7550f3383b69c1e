"""adapt on a GPU: the whole command, and what the compiled layers compute against the same model on a CPU."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_model import make_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_power.hf.attention import use_power
from vllm_power.options import PatternOptions
from vllm_power.tools.adapt.engine import Collator, Planner, compile_layers, speed_up
from vllm_power.tools.cli import app

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

OPTIONS = PatternOptions(block_size=64, window_blocks=2, dense_layers=[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"num_layers": 3, "num_heads": 6, "num_kv_heads": 2, "head_size": 64}
    folder = tmp_path_factory.mktemp("models") / "llama"
    return make_model(folder, "llama", **sizes, vocab_size=300, max_positions=2048)


@pytest.mark.parametrize("extra", [[], ["--lora", "4"], ["--distill", "0.5", "--recall", "0.5", "--apart"]])
def test_the_command(extra: list[str], model: Path, tmp_path: Path) -> None:
    """With its defaults but for sizes: an evaluation before, and a training that learns."""
    draw = random.Random(0)
    text = tmp_path / "text.jsonl"
    with text.open("w") as file:
        for _ in range(300):
            half = " ".join(draw.choice("abcdefgh") for _ in range(draw.randrange(200, 900)))
            file.write(json.dumps({"text": half + half}) + "\n")
    words = f"adapt {model} --data {text} --output {tmp_path / 'out'} --stages 1K:4steps,2K:8steps".split()
    words += ["--batch-tokens", "16384", "--eval-tokens", "16384", "--learning-rate", "3e-3"]
    done = CliRunner().invoke(app, [*words, "--power", OPTIONS.model_dump_json(exclude_unset=True), *extra])
    assert done.exit_code == 0, done.output
    losses = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert [row["length"] for row in losses] == [1024] * 4 + [2048] * 8
    assert all(math.isfinite(row["loss"]) for row in losses)
    if "--distill" in extra:
        return  # a random teacher teaches noise: the loss begins at its own answers and cannot fall
    assert losses[-1]["loss"] < 0.9 * losses[0]["loss"]
    measured = [json.loads(line) for line in (tmp_path / "out" / "perplexity.jsonl").read_text().splitlines()]
    assert measured[-1]["power"] < measured[1]["power"]


def test_a_compiled_step_is_the_same_step(model: Path) -> None:
    """Loss and gradients of packed texts in float32, against the plain path on the CPU."""
    tokens = torch.randint(4, 300, (2, 1500), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(600), torch.arange(900)]).repeat(2, 1)
    labels = tokens.clone()
    labels[positions == 0] = -100
    results = []
    for device in (torch.device("cpu"), torch.device("cuda")):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).train()
        use_power(loaded, OPTIONS)
        planner = None
        if device.type == "cuda":
            planner = Planner(loaded.config, OPTIONS, torch.float32)
            speed_up(loaded, OPTIONS, torch.float32)
            compile_layers(loaded)
        rows = [
            {"input_ids": tokens[row], "position_ids": positions[row], "labels": labels[row]}
            for row in range(2)
        ]
        batch = Collator(planner, OPTIONS)(rows)
        loaded.config.use_cache = False
        loss = loaded(**{name: part.to(device) for name, part in batch.items()}).loss
        loss.backward()
        results.append([loss.detach().cpu(), *(weight.grad.cpu() for weight in loaded.parameters())])
    for right, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=0, atol=2e-4 * right.abs().max().item())
