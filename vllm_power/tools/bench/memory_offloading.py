"""The part ``offloading`` of ``vllm-power bench memory``: a chat's second turn from host memory, on the real engine."""

import os
import time
from collections.abc import Iterator
from typing import Any

from vllm_power.tools.bench.engine import CHUNK, QWEN2_7B, add_requests, engine, greedy, random_tokens
from vllm_power.tools.common.apart import answer
from vllm_power.tools.common.results import Row

QUESTION = 256  # tokens of the second turn after the first
MOST_STEPS = 100_000  # without requests, until all copies are complete


def measure(part: str, impl: str, context: int, output: int, host_gib: float) -> Iterator[Row]:
    """One row: seconds to the first token of a second turn from host memory, and of the first turn, all computed.

    host_gib: size of vLLM's offloading to host memory.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler must be in this process
    settings: dict[str, Any] = {
        "max_model_len": context + QUESTION + 2 * output,
        "max_num_batched_tokens": CHUNK,
        "enable_prefix_caching": True,
        "kv_offloading_size": host_gib,
    }
    with engine(impl, QWEN2_7B, **settings) as llm:
        vllm = llm.llm_engine
        add_requests(vllm, 1, CHUNK, 8)  # exclude the one-time cost of the first request
        while vllm.has_unfinished_requests():
            vllm.step()
        cache = vllm.vllm_config.cache_config
        yield {
            "bench": part,
            "impl": impl,
            "context": context,
            "output": output,
            **two_turns(llm, context, output),
            "unit": "s to the first token of a second turn from host memory",
            "host_gib": host_gib,
            "page": cache.block_size,
            "chunk": CHUNK,
        }


def two_turns(llm: Any, context: int, output: int) -> dict[str, float]:
    """Serve a prompt, forget the device's prefix cache, and serve the prompt again with its answer and a question.

    value, computed: seconds to the first token of the second turn and of the first. held_pages: held by the first turn
    at its end. cached_tokens: those of the second prompt that were not computed.
    """
    vllm = llm.llm_engine
    prompt = random_tokens(vllm, context)
    first = turn(vllm, "first", prompt, output)
    scheduler = vllm.engine_core.engine_core.scheduler
    for _ in range(MOST_STEPS):
        if not scheduler.has_requests():
            break
        vllm.step()
    if scheduler.has_requests() or not llm.reset_prefix_cache():
        raise RuntimeError("the copies to host memory are not complete")
    question = random_tokens(vllm, QUESTION)
    second = turn(vllm, "second", [*prompt, *first["tokens"], *question], output)
    return {
        "value": second["seconds"],
        "computed": first["seconds"],
        "held_pages": first["held_pages"],
        "cached_tokens": second["cached_tokens"],
    }


def turn(vllm: Any, name: str, prompt: list[int], output: int) -> dict[str, Any]:
    """Serve a prompt alone. seconds: to its first token. held_pages: after its last step but one, all groups' pages."""
    scheduler = vllm.engine_core.engine_core.scheduler
    begin, seconds, held, tokens, cached = time.perf_counter(), 0.0, 0, [], 0
    vllm.add_request(name, {"prompt_token_ids": prompt}, greedy(output))
    while vllm.has_unfinished_requests():
        for got in vllm.step():
            seconds = seconds or time.perf_counter() - begin
            tokens += got.outputs[0].token_ids
            cached = got.num_cached_tokens or cached
        for running in scheduler.running:
            tables = scheduler.kv_cache_manager.get_blocks(running.request_id).blocks
            held = sum(not page.is_null for table in tables for page in table)
    return {"seconds": seconds, "held_pages": held, "tokens": tokens, "cached_tokens": cached}


if __name__ == "__main__":
    answer(measure)
