"""The parts of ``vllm-power bench memory`` that run the real engine: ``live`` and ``throughput``."""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from vllm_power.pattern import POWER
from vllm_power.tools.bench.engine import CHUNK, QWEN2_7B, TINY, add_requests, engine, say
from vllm_power.tools.common.apart import answer
from vllm_power.tools.common.results import Row

LIVE_CHUNK = 2_048  # small, so that tokens in flight hide little of the curve
MAX_POINTS = 200  # of a curve in its row
SETTLED = 8  # tokens after the prompt at which its last chunk is settled, overlapping steps included
LOG_INTERVAL = 10  # seconds


def live(impl: str, context: int, output: int, on_gpu: bool) -> Iterator[Row]:
    """One row: the share of the prompt's blocks held after its prefill, the peak, and the curve over time."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler must be in this process
    settings: dict[str, Any] = {
        "max_model_len": context + output,
        "max_num_batched_tokens": LIVE_CHUNK,
        "enforce_eager": True,  # nothing is timed
    }
    if not on_gpu:
        settings["kv_cache_memory_bytes"] = 1 << 30
    with engine(impl, QWEN2_7B if on_gpu else TINY, **settings) as llm:
        block = POWER.block_size
        page = llm.llm_engine.vllm_config.cache_config.block_size
        curve = [(tokens, pages * page / block) for tokens, pages in held(llm.llm_engine, context, output)]
    after_prefill = next(blocks for tokens, blocks in curve if tokens > context + SETTLED)
    blocks = -(-context // block)
    yield {
        "bench": "live",
        "impl": impl,
        "context": context,
        "output": output,
        "value": 100 * after_prefill / blocks,
        "unit": "% of the prompt's blocks held after its prefill",
        "blocks": blocks,
        "peak_blocks": max(blocks for _, blocks in curve),
        "page": page,
        "chunk": LIVE_CHUNK,
        "measured_in": f"vLLM's engine, {'Qwen2-7B shape' if on_gpu else 'a model of one layer'}",
        "points": thinned(curve),
    }


def held(vllm: Any, context: int, output: int) -> Iterator[tuple[int, int]]:
    """Serve one request; after each step: its tokens that are computed or in flight, and the pages that it holds."""
    scheduler = vllm.engine_core.engine_core.scheduler
    add_requests(vllm, 1, context, output)
    while vllm.has_unfinished_requests():
        vllm.step()
        for name, request in scheduler.requests.items():
            (pages,) = scheduler.kv_cache_manager.get_blocks(name).blocks
            yield request.num_computed_tokens, sum(not page.is_null for page in pages)


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points of the curve at about equal distances in tokens, including the first and the last."""
    distance = (curve[-1][0] - curve[0][0]) / MAX_POINTS
    kept = curve[:1]
    for point in curve:
        if point[0] - kept[-1][0] >= distance or point is curve[-1]:
            kept.append(point)
    return kept


def throughput(
    impl: str, requests: int, context: int, output: int, cache_bytes: int | None, seconds: float
) -> Iterator[Row]:
    """One row: tokens per second, prompts and answers, of ``requests`` equal requests that arrive together.

    cache_bytes: size of the KV cache; None: all the memory that vLLM can use. The measurement stops after ``seconds``;
    the row is then marked ``truncated`` and counts the answers, and the prompts with an answer, up to that moment.
    """
    settings: dict[str, Any] = {
        "max_model_len": context + output,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": requests,
        "disable_log_stats": False,
    }
    if cache_bytes:
        settings["kv_cache_memory_bytes"] = cache_bytes
    with engine(impl, QWEN2_7B, **settings) as llm:
        vllm = llm.llm_engine
        add_requests(vllm, 1, CHUNK, 8)  # exclude the one-time cost of the first request
        while vllm.has_unfinished_requests():
            vllm.step()
        begin = time.perf_counter()  # vLLM starts on the first request while the others are added
        add_requests(vllm, requests, context, output)
        served = serve(vllm, begin, seconds, f"{impl}, {requests} requests")
        cache = vllm.vllm_config.cache_config
        yield {
            "bench": "throughput",
            "impl": impl,
            "context": context,
            "output": output,
            "value": (served["answering"] * context + served["answered_tokens"]) / served["seconds"],
            "unit": "tokens/s, prompts and answers",
            "requests": requests,
            **served,
            "truncated": served["finished"] < requests,
            "preemptions": sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"),
            "cache_sequences": cache.num_gpu_blocks * cache.block_size // (context + output),
            "page": cache.block_size,
            "chunk": CHUNK,
        }


def serve(vllm: Any, begin: float, seconds: float, name: str) -> dict[str, Any]:
    """Step the engine until all requests are served, or until ``seconds`` after ``begin``; logs the progress.

    answering: requests with at least one token. most_decoding, mean_decoding: maximum and time-weighted mean of the
    sequences that get a token in one step.
    """
    last = logged = begin
    answering: set[str] = set()
    answered_tokens = finished = most = 0
    area = 0.0
    while vllm.has_unfinished_requests() and last - begin < seconds:
        outputs = vllm.step()
        now = time.perf_counter()
        answering.update(output.request_id for output in outputs)
        answered_tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        finished += sum(output.finished for output in outputs)
        most = max(most, len(outputs))
        area += len(outputs) * (now - last)
        last = now
        if now - logged > LOG_INTERVAL:
            logged = now
            say(f"{name}: {now - begin:.0f} s, {len(outputs)} decoding, {finished} finished")
    return {
        "finished": finished,
        "answering": len(answering),
        "answered_tokens": answered_tokens,
        "seconds": last - begin,
        "most_decoding": most,
        "mean_decoding": area / (last - begin),
    }


PARTS: dict[str, Callable[..., Iterator[Row]]] = {"live": live, "throughput": throughput}


def measure(part: str, *arguments: Any) -> Iterator[Row]:
    """The rows of one of ``PARTS``."""
    return PARTS[part](*arguments)


if __name__ == "__main__":
    answer(measure)
