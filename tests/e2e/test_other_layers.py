"""Layers that share another layer's KV cache, and layers with chunks of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens
from support.tolerance import Allowed, truth

SMALL = {"block_size": 64, "max_num_batched_tokens": 1000}
PROMPTS = [random_tokens(4000, seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def sharing(small_model: Callable[..., Path]) -> Path:
    """Six layers, every second one sees everything; layer 5 reads the KV cache of layer 3."""
    return small_model("gemma4_text", num_layers=6, num_heads=4, num_kv_heads=2, head_size=64)


@pytest.mark.parametrize("dense_layers, reclaims", [([5], False), ([], True)], ids=str)
def test_a_shared_cache_keeps_what_its_readers_read(
    dense_layers: list[int], reclaims: bool, sharing: Path, worker: Worker
) -> None:
    """Reclamation changes nothing, two long prompts at once; if a reader needs all blocks, it is off and says why."""
    results, starts = [], []
    for reclaim in (True, False):
        power: dict[str, Any] = {"dense_layers": dense_layers, "reclaim": reclaim}
        worker.start(sharing, **SMALL, additional_config={"power": power})
        results.append(worker.call(generation.greedy, PROMPTS, 8))
        starts.append(worker.start_lines()[0])
    for on, off in zip(*results, strict=True):
        assert on.tokens == off.tokens
        assert on.logprobs == pytest.approx(off.logprobs, abs=1e-4)
    first = starts[0]
    if dense_layers == [5]:
        assert "KV reclamation off" in first and "layers.5" in first and "layers.3" in first
    if reclaims:
        assert "KV reclamation on" in first


def test_chunked_layers_keep_their_chunks(small_model: Callable[..., Path], worker: Worker) -> None:
    model = small_model("llama4_text", num_layers=4, num_heads=4, num_kv_heads=2, head_size=64)
    prompt = PROMPTS[0][:3000]
    worker.start(model, **SMALL)
    assert "1 of 4 attention layers (not 0, 1, 2)" in "".join(worker.start_lines())
    (result,) = worker.call(generation.greedy, [prompt], 8)
    expected = truth(model, prompt + result.tokens)
    allowed = Allowed.by(model, "float32", prompt)
    allowed.check(result.prompt_logprobs + result.logprobs, expected.logprobs)


def test_a_fitted_length_is_the_one_that_counts(small_model: Callable[..., Path], worker: Worker) -> None:
    """`--max-model-len auto`: a prompt near the length that vLLM fits to its memory is admitted and answered."""
    model = small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)
    worker.start(
        model, block_size=64, max_num_batched_tokens=256, max_model_len=-1, num_gpu_blocks_override=100
    )
    fitted = worker.call(max_model_len)
    assert 5000 < fitted < 40960
    for length in (5000, fitted - 8):
        (result,) = worker.call(generation.greedy, [random_tokens(length)], 4, False)
        assert torch.tensor(result.logprobs).isfinite().all()


def max_model_len(llm: Any) -> int:
    return llm.llm_engine.vllm_config.model_config.max_model_len
