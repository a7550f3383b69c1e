"""A whole model on a GPU, where kernels follow lists of tiles (test_sparse.py holds the kernels to the truth)."""

from pathlib import Path

import pytest
import torch
from support.random_model import make_model
from transformers import AutoModelForCausalLM

from vllm_power.hf.attention import use_power

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


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
