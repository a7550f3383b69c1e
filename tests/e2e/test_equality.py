"""The running engine answers what transformers answers under an explicit Algorithm 1 mask.

The truth is computed in float64. How far from it the engine may be is not taste but measured: transformers in the
engine's dtype, correct by construction, makes an error of its own against the same truth; the engine must make about
the same. The same comparison against dense attention fails clearly, so the tests can.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens
from support.tolerance import Allowed, rms, truth

from vllm_power.pattern import POWER, preset

SCORED = (300, 2600, 5000)  # prompts whose every token is compared
BOUNDARIES = (256, 512, 1536, 2560)  # prompts end just before, generation goes past
STEPS = 12


@dataclass(frozen=True)
class Case:
    family: str
    heads: int
    kv_heads: int
    head_size: int
    page_size: int
    layers: int = 2

    def __str__(self) -> str:
        kind = "mha" if self.heads == self.kv_heads else "mqa" if self.kv_heads == 1 else "gqa"
        return f"{self.family}-{kind}-head{self.head_size}-page{self.page_size}"


CASES = [
    Case("llama", heads=4, kv_heads=4, head_size=64, page_size=128),
    Case("qwen2", heads=4, kv_heads=2, head_size=96, page_size=64),
    Case("qwen3", heads=4, kv_heads=1, head_size=128, page_size=256),
    Case("mistral", heads=4, kv_heads=2, head_size=128, page_size=32),
    Case(
        "gemma3_text", heads=4, kv_heads=2, head_size=64, page_size=128, layers=4
    ),  # every second layer a window
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def model(case: Case, small_model: Callable[..., Path]) -> Path:
    return small_model(
        case.family,
        num_layers=case.layers,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        head_size=case.head_size,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_equals_transformers(model: Path, case: Case, dtype: str, worker: Worker) -> None:
    scored = [random_tokens(length) for length in SCORED]
    growing = [random_tokens(boundary - 6) for boundary in BOUNDARIES]
    worker.start(model, dtype=dtype, block_size=case.page_size)
    results = worker.call(generation.greedy, [*scored, *growing], [1] * len(scored) + [STEPS] * len(growing))

    for prompt, result in zip(scored, results, strict=False):
        Allowed.by(model, dtype, prompt, POWER).check(
            result.prompt_logprobs, truth(model, prompt, POWER).logprobs
        )

    allowed = Allowed.by(model, dtype, scored[1], POWER)
    for prompt, result in zip(growing, results[len(scored) :], strict=True):
        assert len(result.tokens) == STEPS
        check_greedy(model, prompt, result, allowed)


def check_greedy(model: Path, prompt: list[int], result: generation.Generated, allowed: Allowed) -> None:
    """Every generated token is the best one of the truth; of a wide tolerance, best but for the allowed error."""
    expected = truth(model, prompt + result.tokens, POWER)
    allowed.check(result.prompt_logprobs + result.logprobs, expected.logprobs)
    if allowed.exact:
        assert result.tokens == expected.best[len(prompt) - 1 :].tolist()
    else:
        assert expected.behind[len(prompt) - 1 :].max().item() <= 2 * allowed.worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_attention_would_fail(model: Path, dtype: str) -> None:
    """The masks differ past 1,536 tokens only, and there by far more than the tolerance."""
    tokens = random_tokens(SCORED[-1])
    allowed = Allowed.by(model, dtype, tokens, POWER)
    dense, sparse = (truth(model, tokens, pattern).logprobs for pattern in (preset("full"), POWER))
    assert torch.equal(dense[:1536], sparse[:1536])
    print(f"difference {rms(dense - sparse):.1e}, allowed {allowed.rms:.1e}")
    assert rms(dense - sparse) > allowed.wrong
    with pytest.raises(AssertionError):
        allowed.check(dense.tolist(), sparse)


def test_a_long_answer_crosses_many_blocks(small_model: Callable[..., Path], worker: Worker) -> None:
    """1,100 decode steps, one token each, over the boundaries at 1,536, 1,792, 2,048, 2,304 and 2,560."""
    model = small_model("llama", num_heads=4, num_kv_heads=4, head_size=64)
    prompt = random_tokens(1500)
    worker.start(model, block_size=128)
    (result,) = worker.call(generation.greedy, [prompt], 1100)
    check_greedy(model, prompt, result, Allowed.by(model, "float32", random_tokens(2600), POWER))


@pytest.mark.parametrize(
    "options",
    [
        # longnet depends on both indices of a pair, not on their distance alone
        {"pattern": "longnet", "block_size": 64},
        {"pattern": "power", "block_size": 128, "window_blocks": 2, "sink_blocks": 2},
        {"pattern": "power", "dense_layers": [1]},
    ],
    ids=["longnet-block64", "power-block128-window2-sink2", "one-layer-dense"],
)
def test_other_patterns(options: dict[str, Any], small_model: Callable[..., Path], worker: Worker) -> None:
    """Prefill in chunks and a few decode steps under every kind of option."""
    model = small_model("llama", num_heads=4, num_kv_heads=4, head_size=64)
    fields = dict(options)
    dense_layers = tuple(fields.pop("dense_layers", ()))
    pattern = preset(fields.pop("pattern"), **fields)
    prompt = random_tokens(2600)
    worker.start(model, block_size=32, additional_config={"power": options})
    (result,) = worker.call(generation.greedy, [prompt], STEPS)
    expected = truth(model, prompt + result.tokens, pattern, dense_layers=dense_layers)
    allowed = Allowed.by(model, "float32", prompt, pattern, dense_layers=dense_layers)
    allowed.check(result.prompt_logprobs + result.logprobs, expected.logprobs)
    assert rms(expected.logprobs[: len(prompt) - 1] - truth(model, prompt).logprobs) > allowed.wrong
