"""Requests that ask that all their rows see everything, and others with them, in a running engine.

Held to transformers under an explicit mask, as the other dense rows are.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens
from support.row_rules import EVERYTHING, RULES, TOO_SMALL, check, options

STEPS = 20
LENGTHS = (1100, 1088, 1000, 300, 1)
DENSE = (1, 2, 4)
RULE = pytest.mark.parametrize("name", ["training-free", "trained"])


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)


def served(name: str, **others: Any) -> dict[str, Any]:
    return options(RULES[name], **{"dense_requests": True, **others})


def rules(name: str, number: int, dense: tuple[int, ...] = DENSE) -> list[Any]:
    return [EVERYTHING if request in dense else RULES[name] for request in range(number)]


@pytest.mark.parametrize(
    "name, chunk, dtype",
    [
        ("training-free", 64, "float32"),
        ("tail-only", 1000, "float32"),
        ("trained", 64, "float32"),
        ("trained", 1000, "bfloat16"),
    ],
)
def test_a_mixed_batch(name: str, chunk: int, dtype: str, model: Path, worker: Worker) -> None:
    prompts = [random_tokens(length) for length in LENGTHS]
    worker.start(
        model, block_size=32, dtype=dtype, max_num_batched_tokens=chunk, additional_config=served(name)
    )
    results = worker.call(generation.greedy, prompts, STEPS, True, DENSE)
    check(model, results, prompts, rules(name, len(prompts)), dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA graphs")
@RULE
def test_cuda_graphs(name: str, model: Path, worker: Worker) -> None:
    prompts = [random_tokens(length) for length in LENGTHS]
    worker.start(model, block_size=64, dtype="bfloat16", enforce_eager=False, additional_config=served(name))
    results = worker.call(generation.greedy, prompts, STEPS, True, DENSE)
    check(model, results, prompts, rules(name, len(prompts)), "bfloat16")


@pytest.mark.parametrize("reclaim", [True, False], ids=["reclaim", "keep"])
@RULE
def test_prefix_hits(name: str, reclaim: bool, model: Path, worker: Worker) -> None:
    """A dense request finds pages of dense requests only, of any length, and the other way round."""
    first = random_tokens(1100)
    given = served(name, reclaim=reclaim)
    worker.start(model, block_size=32, enable_prefix_caching=True, additional_config=given)
    worker.call(clear_cache)
    found = []
    for prompt, dense in (
        (first, False),
        (first, True),
        (first, True),
        (first[:900] + random_tokens(300), True),
        (first, False),
        (first[:700], False),
    ):
        (result,) = worker.call(generation.greedy, [prompt], STEPS, False, [0] if dense else [])
        check(model, [result], [prompt], EVERYTHING if dense else RULES[name])
        found.append(result.cached_tokens)
    assert found[:2] == [0, 0]
    assert found[2:4] == [1100 // 32 * 32, 900 // 32 * 32]
    assert found[4] == 1100 // 32 * 32
    assert found[5] > 300


@RULE
def test_a_hit_with_a_hole_is_none(name: str, model: Path, worker: Worker) -> None:
    """Pages that vLLM has taken from the cache, in a place that the pattern would not read."""
    prompt = random_tokens(1100)
    worker.start(model, block_size=32, enable_prefix_caching=True, additional_config=served(name))
    worker.call(clear_cache)
    worker.call(generation.greedy, [prompt], STEPS, False, [0])
    worker.call(evict, 11)
    (result,) = worker.call(generation.greedy, [prompt], STEPS, False, [0])
    assert result.cached_tokens == 11 * 32
    check(model, [result], [prompt], EVERYTHING)


@RULE
def test_preemption(name: str, model: Path, worker: Worker) -> None:
    prompts = [random_tokens(1020, seed) for seed in (1, 2, 3)]
    worker.start(
        model,
        **TOO_SMALL,
        additional_config=served(name, reclaim=False),
    )
    before = worker.call(generation.metrics)["vllm:num_preemptions"]
    results = worker.call(generation.greedy, prompts, 60, False, [0, 2])
    assert worker.call(generation.metrics)["vllm:num_preemptions"] > before
    check(model, results, prompts, rules(name, 3, (0, 2)))


@pytest.mark.parametrize("name", ["tail-only", "trained"])
def test_reclamation_spares_dense_requests(name: str, model: Path, worker: Worker) -> None:
    """Others give blocks back, and a dense request is admitted only when the pool has room for all of its pages."""
    prompts = [random_tokens(3000, seed) for seed in (1, 2)]
    worker.start(
        model,
        block_size=64,
        max_model_len=3072,
        max_num_batched_tokens=500,
        enable_prefix_caching=False,
        num_gpu_blocks_override=1 + 64,
        additional_config=served(name),
    )
    before = worker.call(generation.metrics)["vllm:num_preemptions"]
    reclaimed = worker.call(generation.reclaimed)
    results = worker.call(generation.greedy, prompts, STEPS, False, [0, 1])
    assert worker.call(generation.reclaimed) == reclaimed
    assert worker.call(generation.metrics)["vllm:num_preemptions"] == before
    check(model, results, prompts, EVERYTHING)
    results = worker.call(generation.greedy, prompts, STEPS, False, [0])
    assert worker.call(generation.reclaimed) > reclaimed
    check(model, results, prompts, rules(name, 2, (0,)))


def test_the_cache_must_hold_a_dense_request(model: Path, another_worker: Callable[..., Worker]) -> None:
    """Otherwise one would wait for ever."""
    settings = {"block_size": 64, "enable_prefix_caching": False, "kv_cache_memory_bytes": 14 << 20}
    worker = another_worker()
    worker.start(model, **settings, additional_config=served("trained", dense_requests=False))
    with pytest.raises(RuntimeError, match="KV cache is needed"):
        worker.start(model, **settings, additional_config=served("trained"))


@pytest.mark.parametrize(
    "offered, asked, message",
    [
        (True, "sparse", "vllm_xargs.power must be \"dense\" or left out, not 'sparse'"),
        (True, 1, 'vllm_xargs.power must be "dense" or left out, not 1'),
        (False, "dense", 'this server does not serve vllm_xargs.power "dense"'),
    ],
)
def test_refused(offered: bool, asked: Any, message: str, model: Path, worker: Worker) -> None:
    worker.start(model, additional_config=served("trained", dense_requests=offered))
    with pytest.raises(RuntimeError, match=message):
        worker.call(ask, asked)


def ask(llm: Any, asked: Any) -> None:
    from vllm import SamplingParams

    llm.generate({"prompt_token_ids": [1, 2]}, SamplingParams(extra_args={"power": asked}), use_tqdm=False)


def clear_cache(llm: Any) -> None:
    llm.reset_prefix_cache()


def evict(llm: Any, page: int) -> None:
    """Take one page, by its place in the sequence, from the cache."""
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    cached = [block for block in pool.blocks if block.block_hash is not None]
    pool._maybe_evict_cached_block(sorted(cached, key=lambda block: block.block_id)[page])
