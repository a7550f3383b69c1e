"""Giving KV blocks back changes no answer by a bit, in the real engine, with NaN in every page that nobody holds."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reclaim
from support.engine_worker import Worker
from support.generation import metrics
from support.prompts import random_tokens

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import POWER

SMALL_PAGES = {"block_size": 64, "enable_prefix_caching": False, "kv_cache_memory_bytes": 64 << 20}


@pytest.fixture(scope="module")
def model(small_model: Callable[..., Path]) -> Path:
    return small_model("llama", num_heads=4, num_kv_heads=2, head_size=64)


def both(
    worker: Worker, model: Path, settings: dict[str, Any], *job: Any
) -> tuple[reclaim.Served, reclaim.Served]:
    """The job with reclamation on and off; both leave the pool as full as it was."""
    power = settings.get("additional_config", {}).get("power", {})
    results = []
    for on in (True, False):
        options = {"power": {**power, "reclaim": on}}
        worker.start(model, **{**SMALL_PAGES, **settings, "additional_config": options})
        results.append(worker.call(reclaim.serve, *job))
        assert results[-1].free_after == results[-1].free_before
        for request in results[-1].answers:
            for _, logprobs in request:
                assert torch.tensor(logprobs).isfinite().all()
    return results[0], results[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 300},
        {"max_num_batched_tokens": 1500, "dtype": "bfloat16"},
        {"max_num_batched_tokens": 700, "additional_config": {"power": {"dense_layers": [1]}}},
        {
            "max_num_batched_tokens": 700,
            "additional_config": {"power": {"pattern": "stride_slash", "stride": 4}},
        },
    ],
    ids=["small_chunks", "large_chunks_bf16", "hybrid", "stride_slash"],
)
def test_same_answers(model: Path, worker: Worker, settings: dict[str, Any]) -> None:
    generator = random.Random(str(settings))
    prompts = [random_tokens(generator.randint(1500, 4500), seed) for seed in range(3)]
    budgets = [generator.randint(1, 70) for _ in prompts]
    on, off = both(worker, model, settings, prompts, budgets)
    assert on.answers == off.answers
    if "dense_layers" not in str(settings):  # there, groups of layers count pages of their own
        assert on.peak < 0.9 * off.peak


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_drafts(
    method: str, model: Path, small_model: Callable[..., Path], another_worker: Callable[..., Worker]
) -> None:
    """Speculative decoding, some drafts rejected, across block boundaries. The draft model runs the pattern too."""
    drafting: dict[str, Any] = {"method": method, "num_speculative_tokens": 4}
    if method == "ngram":
        drafting |= {"prompt_lookup_min": 1, "prompt_lookup_max": 3}
    else:
        draft = small_model("llama", num_layers=1, num_heads=4, num_kv_heads=2, head_size=64)
        drafting |= {"model": str(draft), "attention_backend": "power"}
    job = ([random_tokens(2800), random_tokens(3320)], [60, 60])
    served = []
    for on in (True, False):  # vLLM starts a drafting engine on a CPU once in a process
        engine = another_worker().start(
            model, **SMALL_PAGES, speculative_config=drafting, additional_config={"power": {"reclaim": on}}
        )
        served.append(engine.call(reclaim.serve, *job))
        assert ("and 1 that draft" in engine.log.read_text()) is (method == "draft_model")
        counts = engine.call(metrics)
        accepted = counts["vllm:spec_decode_num_accepted_tokens"]
        assert accepted < counts["vllm:spec_decode_num_draft_tokens"]
    assert served[0].answers == served[1].answers
    assert served[0].peak < served[1].peak


def test_a_long_prompt_with_a_short_answer_holds_little(model: Path, worker: Worker) -> None:
    """8,000 tokens in, 20 out: the peak is near half of all blocks."""
    on, off = both(worker, model, {"max_num_batched_tokens": 256}, [random_tokens(8000)], [20])
    assert on.answers == off.answers
    assert off.peak == -(-8020 // 64)
    assert on.peak <= 0.65 * off.peak


def test_parallel_samples(model: Path, worker: Worker) -> None:
    settings = {"enable_prefix_caching": True}
    on, off = both(worker, model, settings, [random_tokens(2500), random_tokens(3100)], [60, 90], 3)
    assert on.answers == off.answers
    assert len(on.answers[0]) == 3 and len({tuple(tokens) for tokens, _ in on.answers[0]}) > 1


def test_aborts_leave_the_rest_alone(model: Path, worker: Worker) -> None:
    prompts = [random_tokens(3000, seed) for seed in range(3)]
    on, off = both(worker, model, {}, prompts, [40] * 3, 1, {0: 2, 2: 20})
    assert on.answers == off.answers


def test_preemption(model: Path, worker: Worker) -> None:
    """All requests are preempted twice, in prefill and in decode, and recomputed."""
    job = ([random_tokens(2600, seed) for seed in range(2)], [40] * 2, 1, None, (2, 20))
    on, off = both(worker, model, {}, *job)
    assert on.preemptions == off.preemptions == 2
    assert on.answers == off.answers
    assert on.peak < off.peak


def test_turns_of_a_chat(model: Path, worker: Worker) -> None:
    """Each turn finds the last one in the prefix cache, although blocks of it were given back, and NaN, meanwhile."""
    answers, cached = [], []
    for on in (True, False):
        worker.start(
            model, block_size=64, enable_prefix_caching=True, additional_config={"power": {"reclaim": on}}
        )
        chat = random_tokens(2200)
        said = []
        for turn in range(3):
            served = worker.call(reclaim.serve, [chat], [70])
            ((tokens, _),) = served.answers[0]
            said.append(tokens)
            cached.append(served.cached[0])
            chat = chat + tokens + random_tokens(300, turn + 1)
        answers.append(said)
    assert answers[0] == answers[1]
    assert cached[:3] == cached[3:] and cached[1] >= 2200 // 64 * 64


@pytest.mark.parametrize("seed", [1, 2])
def test_everything_at_once(model: Path, worker: Worker, seed: int) -> None:
    """Shared prefixes, several samples, a dense layer, aborts and preemptions in one run."""
    generator = random.Random(seed)
    family = random_tokens(2000, seed)
    prompts = [
        family[: generator.choice((0, 700, 1600, 2000))] + random_tokens(generator.randint(1, 2500), number)
        for number in range(6)
    ]
    budgets = [generator.randint(1, 60) for _ in prompts]
    samples = [generator.choice((1, 1, 2, 3)) for _ in prompts]
    aborts = {number: generator.randint(1, 40) for number in generator.sample(range(6), 2)}
    settings = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": generator.randint(200, 1200),
        "additional_config": {"power": {"dense_layers": [0]}},
    }
    on, off = both(worker, model, settings, prompts, budgets, samples, aborts, (5, 18))
    assert on.answers == off.answers
    assert on.preemptions == off.preemptions > 0


def test_a_pool_under_pressure_serves_all(model: Path, worker: Worker) -> None:
    """Twelve requests in a cache that holds the peaks of two: they wait, or are thrown out, and all are answered."""
    generator = random.Random(7)
    prompts = [random_tokens(generator.randint(500, 4000), number) for number in range(12)]
    budgets = [generator.randint(20, 200) for _ in prompts]
    settings = {"max_model_len": 4224, "num_gpu_blocks_override": 100, "max_num_batched_tokens": 512}
    worker.start(model, **{**SMALL_PAGES, **settings})
    served = worker.call(reclaim.serve, prompts, budgets)
    assert [len(tokens) for ((tokens, _),) in served.answers] == budgets
    assert served.free_after == served.free_before
    assert served.peak > 80


def test_vllm_reports_the_concurrency(model: Path, worker: Worker) -> None:
    """Its line at the start counts a request by its peak, about half of all blocks and what is in work."""
    told = []
    for on in (True, False):
        settings = {
            "max_model_len": 8192,
            "max_num_batched_tokens": 256,
            "num_gpu_blocks_override": 256,
            "async_scheduling": False,  # by vLLM's default a GPU has two steps in work, a CPU one
        }
        options = {"power": {"reclaim": on}}
        worker.start(model, **{**SMALL_PAGES, **settings, "additional_config": options})
        lines = re.findall(
            r"Maximum concurrency for 8,192 tokens per request: ([\d.]+)x", worker.log.read_text()
        )
        told.append(float(lines[-1]))
    assert told[1] == 2.0  # 256 pages of 64 tokens
    assert told[0] == pytest.approx(256 / peak_pages(8192, 256), abs=0.01)


def peak_pages(tokens: int, chunk: int) -> int:
    """Pages of 64 tokens that a request holds at its peak, with one chunk and the block it ends in in work."""
    last = (tokens - 2) // POWER.block_size
    return 4 * (lifetimes(POWER, last).peak_from[0] + 1 + chunk // POWER.block_size)


def test_a_prompt_that_fits_only_thanks_to_reclamation(model: Path, worker: Worker) -> None:
    """A cache of 100 pages of 64 tokens serves 8,000 tokens; without reclamation vLLM refuses to start, and with it
    if the cache cannot hold the peak."""
    settings = {
        **SMALL_PAGES,
        "max_model_len": 8064,
        "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": 100,
    }
    worker.start(model, **settings)
    served = worker.call(reclaim.serve, [random_tokens(8000), random_tokens(4000)], [30, 30])
    assert [len(tokens) for ((tokens, _),) in served.answers] == [30, 30]
    assert served.free_after == served.free_before
    too_small = settings | {"num_gpu_blocks_override": 70}  # the peak is 80 pages, a chunk in work included
    for refused in (too_small, settings | {"additional_config": {"power": {"reclaim": False}}}):
        with pytest.raises(RuntimeError, match=r"max seq len|max_model_len|KV cache"):
            worker.start(model, **refused)
