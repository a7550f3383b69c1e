"""Several samples of a prompt, and requests that are aborted, with rows that see everything.

Held to transformers under an explicit mask. Every page that nobody holds is NaN, and none is lost.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import reclaim
from support.engine_worker import Worker
from support.prompts import random_tokens
from support.row_rules import EVERYTHING, PATTERN, RULES, options
from support.tolerance import Allowed, truth

PROMPTS = [random_tokens(length, length) for length in (1100, 900, 1000, 700)]
SAMPLES = [4, 1, 4, 1]
ABORTED, DENSE = 1, 2
STEPS = 24


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)


# In steps of 300 tokens the prompts take 13 steps: the abort comes while it prefills, and while it decodes.
@pytest.mark.parametrize(
    "name, abort_after, caching",
    [
        ("training-free", 5, True),
        ("training-free", 20, False),
        ("tail-only", 20, True),
        ("trained", 20, True),
    ],
)
def test_the_others_go_on_exactly(
    name: str, abort_after: int, caching: bool, model: Path, worker: Worker
) -> None:
    worker.start(
        model,
        block_size=32,
        max_num_batched_tokens=300,
        enable_prefix_caching=caching,
        kv_cache_memory_bytes=64 << 20,
        additional_config=options(RULES[name], dense_requests=True),
    )
    budgets = [STEPS] * len(PROMPTS)
    aborts = {ABORTED: abort_after}
    served = worker.call(reclaim.serve, PROMPTS, budgets, SAMPLES, aborts, (), [DENSE])
    assert served.free_after == served.free_before
    kept = [number for number in range(len(PROMPTS)) if number != ABORTED]
    rule = {"rule": RULES[name], "prompt_tokens": len(PROMPTS[0])}
    allowed = Allowed.by(model, "float32", PROMPTS[0], PATTERN, **rule)
    for number, samples in zip(kept, served.answers, strict=True):
        prompt = PROMPTS[number]
        assert len({tuple(tokens) for tokens, _ in samples}) == SAMPLES[number]
        own = EVERYTHING if number == DENSE else RULES[name]
        for tokens, logprobs in samples:
            assert len(tokens) == STEPS
            expected = truth(model, prompt + tokens, PATTERN, rule=own, prompt_tokens=len(prompt))
            allowed.check(logprobs, expected.logprobs[-STEPS:])
