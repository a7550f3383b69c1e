"""FlexAttention's kernels on a GPU, forward and backward: as near to the truth as exact attention in the same dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.random_model import make_model
from transformers import AutoModelForCausalLM

from vllm_power.hf import flex, segments
from vllm_power.hf.attention import use_power
from vllm_power.hf.masks import aligned
from vllm_power.pattern import POWER, Pattern, preset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# texts of a row of 5,000 tokens, and how many of its tokens are new
LAYOUTS = {
    "one-text": (((0, 5000),), 5000),
    "padded-left": (((37, 5000),), 5000),
    "packed": (((0, 1999), (1999, 2000), (2000, 4900)), 5000),
    "cached": (((0, 5000),), 700),
}


@pytest.mark.parametrize("pattern", [POWER, preset("power", block_size=32, window_blocks=2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_kernels(pattern: Pattern, layout: Any) -> None:
    """Outputs and gradients in bfloat16, with 14 query heads on 2 KV heads."""
    documents, queries = layout
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 14, queries, 64), (1, 2, 5000, 64), (1, 2, 5000, 64)
    states = [torch.randn(shape, generator=generator).to("cuda", torch.bfloat16) for shape in shapes]
    direction = torch.randn(shapes[0], generator=generator).to("cuda", torch.bfloat16)

    def run(attend: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        given = [state.to(dtype, copy=True).requires_grad_() for state in states]
        output = attend(*given)
        output.backward(direction.to(dtype))
        return [output.detach().double(), *(state.grad.double() for state in given)]

    def exact(*given: torch.Tensor) -> torch.Tensor:
        return segments.attend(*given, pattern, documents, 0.125)

    texts = aligned(pattern, documents, queries, 5000, torch.device("cuda"))
    truth = run(exact, torch.float64)
    allowed = [(ours - theirs).norm() for ours, theirs in zip(run(exact, torch.bfloat16), truth, strict=True)]
    told = run(lambda *given: flex.attend(*given, texts, 0.125), torch.bfloat16)
    for name, ours, theirs, most in zip(("output", "dq", "dk", "dv"), told, truth, allowed, strict=True):
        error = (ours - theirs).norm()
        print(f"{name}: error {error:.2e}, exact attention's {most:.2e}")
        assert error <= 2 * most


@torch.no_grad()
def test_a_model_answers_as_on_a_cpu(tmp_path: Path) -> None:
    """A batch with padding, one dense layer, layers with a window; then greedy generation."""
    path = make_model(tmp_path / "model", "gemma3_text", num_layers=4, vocab_size=512, dtype="float32")
    batch = torch.randint(4, 512, (2, 3000), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(batch)
    mask[1, :500] = 0
    answers = []
    for device in ("cpu", "cuda"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
        use_power(model, {"block_size": 128, "window_blocks": 2, "dense_layers": [1]})
        logits = model(batch.to(device), attention_mask=mask.to(device)).logits.cpu()
        generated = model.generate(
            batch.to(device), attention_mask=mask.to(device), max_new_tokens=20, do_sample=False
        )
        answers.append((logits[mask.bool()], generated.cpu()))
    (expected, tokens), (logits, on_gpu) = answers
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert torch.equal(tokens, on_gpu)
