"""The engine really runs the pattern: what lies outside it may hold anything."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import generation, poison
from support.engine_worker import Worker
from support.prompts import random_tokens

from vllm_power.pattern import POWER

pytestmark = pytest.mark.cpu
PROMPT = random_tokens(4000)
STEPS = 120  # over the boundary at 4,096
SMALL_CHUNKS = {
    "max_num_batched_tokens": 200,
    "enable_prefix_caching": False,
    "block_size": 64,
    "additional_config": {"power": {"reclaim": False}},  # a request keeps its pages, to poison them
}


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("qwen2", num_heads=4, num_kv_heads=2, head_size=64)


def test_pages_outside_the_pattern_are_never_read(model: Path, worker: Worker) -> None:
    """NaN in them, in every step of prefill and decode, changes not a bit of the answer."""
    worker.start(model, **SMALL_CHUNKS)
    (clean,) = worker.call(generation.greedy, [PROMPT], STEPS)
    poisoned, poisonings = worker.call(poison.greedy_over_poison, PROMPT, STEPS, POWER)
    print(f"poisoned {poisonings} times a page")
    # In each decode step 9 of 15 earlier blocks are hidden: 4 pages each.
    assert poisonings > STEPS * 9 * 4
    assert torch.tensor(poisoned.prompt_logprobs + poisoned.logprobs).isfinite().all()
    assert poisoned == clean


def test_dense_attention_reads_them(model: Path, worker: Worker) -> None:
    """The same poison ruins vLLM's own backend, so the test above can fail."""
    worker.start(model, **SMALL_CHUNKS, attention_backend="CPU_ATTN")
    (clean,) = worker.call(generation.greedy, [PROMPT], 4)
    poisoned, _ = worker.call(poison.greedy_over_poison, PROMPT, 4, POWER)
    assert torch.tensor(clean.prompt_logprobs + clean.logprobs).isfinite().all()
    assert not torch.tensor(poisoned.prompt_logprobs).isfinite().all()
    assert not torch.tensor(poisoned.logprobs).isfinite().any()


def test_start_line(model: Path, worker: Worker) -> None:
    """Said once: pattern, density, executor and how many layers run it."""
    worker.start(model, additional_config={"power": {"block_size": 128}})
    lines = worker.start_lines()
    assert len(lines) == 1
    assert "power (block 128, sink 1, window 5)" in lines[0]
    assert re.search(r"executor cpu\b", lines[0])
    assert "2 of 2 attention layers" in lines[0]
    density = float(re.search(r"([\d.]+) ?%", lines[0]).group(1))
    assert density == pytest.approx(100 * counted_density(), abs=0.1)


def counted_density() -> float:
    """Counted pair by pair from Algorithm 1, over 8,192 tokens in blocks of 128."""
    pairs = [(q, k) for q in range(64) for k in range(q + 1)]
    seen = [q - k < 5 or (q - k) & (q - k - 1) == 0 or k == 0 for q, k in pairs]
    return sum(seen) / len(seen)
