"""The pages that one request holds as it is served by the real engine, step by step."""

import os
from collections.abc import Iterator
from typing import Any

from vllm_power.pattern import POWER
from vllm_power.tools.bench.engine import QWEN2_7B, TINY, add_requests, answer, engine
from vllm_power.tools.common.results import Row

CHUNK = 2_048  # small, so that what is in work hides little of the curve
POINTS = 200  # of a curve that are kept, at most
SETTLED = 8  # tokens after the prompt by which its last chunk is settled, steps that overlap included


def measure(impl: str, context: int, output: int, on_gpu: bool) -> Iterator[Row]:
    """One row: the share of the prompt's blocks held once its prefill is through, the peak, and the whole curve."""
    settings: dict[str, Any] = {
        "max_model_len": context + output,
        "max_num_batched_tokens": CHUNK,
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
        "chunk": CHUNK,
        "measured_in": f"vLLM's engine, {'Qwen2-7B shape' if on_gpu else 'a model of one layer'}",
        "points": thinned(curve),
    }


def held(vllm: Any, context: int, output: int) -> Iterator[tuple[int, int]]:
    """Serve one request; after each step: its tokens that are computed or in work, and the pages that it holds."""
    scheduler = vllm.engine_core.engine_core.scheduler
    add_requests(vllm, 1, context, output)
    while vllm.has_unfinished_requests():
        vllm.step()
        for name, request in scheduler.requests.items():
            (pages,) = scheduler.kv_cache_manager.get_blocks(name).blocks
            yield request.num_computed_tokens, sum(not page.is_null for page in pages)


def thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Points of the curve about evenly far apart in tokens, the first and the last among them."""
    least = (curve[-1][0] - curve[0][0]) / POINTS
    kept = curve[:1]
    for point in curve:
        if point[0] - kept[-1][0] >= least or point is curve[-1]:
            kept.append(point)
    return kept


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler must be in this process
    answer(measure)
