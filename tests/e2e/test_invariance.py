"""However vLLM schedules, stores, shards or guesses, the answer is the same.

The reference is the plainest engine: each request alone, its prompt in one step, no prefix cache, then one token at a
time. In float32, so that the greedy tokens must be equal, every one.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import generation
from support.engine_worker import NGRAM_DRAFTS, Worker
from support.prompts import random_tokens
from support.tolerance import Allowed, truth

STEPS = 24
PROMPTS = [random_tokens(length) for length in (2600, 300, 1780, 1, 2040, 700, 1525)]
ONE_STEP = {"max_num_batched_tokens": 8192, "enable_prefix_caching": False}


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)


@pytest.fixture(scope="module")
def expected(model: Path, worker: Worker) -> list[generation.Generated]:
    """The reference's answers to PROMPTS."""
    worker.start(model, **ONE_STEP)
    return [worker.call(generation.greedy, [prompt], STEPS)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def allowed(model: Path) -> Allowed:
    """Two correct float32 computations differ by no more than this."""
    return Allowed.by(model, "float32", PROMPTS[0])


def check_same(
    results: list[generation.Generated], expected: list[generation.Generated], allowed: Allowed
) -> None:
    assert [result.tokens for result in results] == [reference.tokens for reference in expected]
    for result, reference in zip(results, expected, strict=True):
        allowed.check(result.logprobs, torch.tensor(reference.logprobs, dtype=torch.float64))
        if result.prompt_logprobs:
            allowed.check(
                result.prompt_logprobs, torch.tensor(reference.prompt_logprobs, dtype=torch.float64)
            )


def test_batched_equals_alone(
    model: Path, worker: Worker, expected: list[generation.Generated], allowed: Allowed
) -> None:
    worker.start(model, **ONE_STEP)
    check_same(worker.call(generation.greedy, PROMPTS, STEPS), expected, allowed)


@pytest.mark.parametrize("chunk", [97, 1000])
def test_any_chunking(
    chunk: int, model: Path, worker: Worker, expected: list[generation.Generated], allowed: Allowed
) -> None:
    """Prompts cut anywhere, and mixed with the decode steps of the others."""
    worker.start(model, max_num_batched_tokens=chunk, enable_prefix_caching=False)
    check_same(worker.call(generation.greedy, PROMPTS, STEPS), expected, allowed)


def test_prefill_equals_decode(
    model: Path, worker: Worker, expected: list[generation.Generated], allowed: Allowed
) -> None:
    """What was generated token by token, handed over as part of a prompt."""
    worker.start(model, **ONE_STEP)
    whole = [prompt + result.tokens for prompt, result in zip(PROMPTS, expected, strict=True)]
    for result, reference in zip(worker.call(generation.greedy, whole), expected, strict=True):
        allowed.check(result.prompt_logprobs[-STEPS:], torch.tensor(reference.logprobs, dtype=torch.float64))


def test_prefix_caching(
    model: Path, worker: Worker, expected: list[generation.Generated], allowed: Allowed
) -> None:
    """A request that finds its prefix in the cache, whole or in part, answers as without the cache."""
    other_end = PROMPTS[0][:2100] + random_tokens(150, seed=1)
    worker.start(model, **ONE_STEP)
    (without,) = worker.call(generation.greedy, [other_end], STEPS, False)

    worker.start(model, enable_prefix_caching=True, block_size=64)
    first, second, third = (
        worker.call(generation.greedy, [prompt], STEPS, False)[0]
        for prompt in (PROMPTS[0], PROMPTS[0], other_end)
    )
    assert first.cached_tokens == 0
    assert second.cached_tokens == 2600 // 64 * 64
    assert third.cached_tokens == 2100 // 64 * 64
    check_same([first, second, third], [expected[0], expected[0], without], allowed)


def test_preemption(model: Path, worker: Worker, allowed: Allowed) -> None:
    """Three growing requests do not fit: one is preempted and recomputed, with the same answer."""
    prompts = [random_tokens(1780, seed) for seed in (1, 2, 3)]
    worker.start(model, **ONE_STEP)
    alone = [worker.call(generation.greedy, [prompt], STEPS, False)[0] for prompt in prompts]

    # 14 pages each hold 1,792 tokens; one page is vLLM's own, so the last request to need its 15th finds none.
    worker.start(
        model,
        enable_prefix_caching=False,
        block_size=128,
        max_model_len=2048,
        num_gpu_blocks_override=1 + 3 * 15 - 1,
        additional_config={"power": {"reclaim": False}},
    )
    before = worker.call(generation.metrics)["vllm:num_preemptions"]
    results = worker.call(generation.greedy, prompts, STEPS, False)
    assert worker.call(generation.metrics)["vllm:num_preemptions"] > before
    check_same(results, alone, allowed)


def test_speculative_decoding(
    model: Path, worker: Worker, another_worker: Callable[..., Worker], allowed: Allowed
) -> None:
    """Drafts of four tokens straddle the block boundaries at 1,792 and 2,048; some are accepted, some are not."""
    prompts = [random_tokens(1780), random_tokens(2040)]
    steps = 300
    worker.start(model, **ONE_STEP)
    plain = worker.call(generation.greedy, prompts, steps, False)

    worker = another_worker()
    worker.start(
        model,
        enable_prefix_caching=False,
        speculative_config=NGRAM_DRAFTS,
    )
    before = worker.call(generation.metrics)
    results = worker.call(generation.greedy, prompts, steps, False)
    after = worker.call(generation.metrics)
    drafted, accepted = (
        after[name] - before.get(name, 0)
        for name in ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
    )
    print(f"drafted {drafted}, accepted {accepted}")
    assert 0 < accepted < drafted
    check_same(results, plain, allowed)


@pytest.mark.cpu
def test_fp8_cache(model: Path, worker: Worker) -> None:
    """Equal to transformers over keys and values cut to fp8, by float32's error; the cut itself is far above that."""
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        with pytest.raises(RuntimeError, match="FP8 KV cache on CPU requires x86 with AVX-512 or AMX"):
            worker.start(model, kv_cache_dtype="fp8")
        return
    prompt = PROMPTS[0]
    worker.start(model, kv_cache_dtype="fp8")
    (result,) = worker.call(generation.greedy, [prompt], STEPS)
    expected = truth(model, prompt + result.tokens, kv_cache="fp8")
    Allowed.by(model, "float32", prompt, kv_cache="fp8").check(
        result.prompt_logprobs + result.logprobs, expected.logprobs
    )
    with pytest.raises(AssertionError):
        Allowed.by(model, "float32", prompt).check(result.prompt_logprobs, truth(model, prompt).logprobs)
