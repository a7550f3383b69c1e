"""Many long requests through the whole engine on a GPU: what faster attention brings, and what more sequences bring."""

import time
from collections.abc import Iterator
from typing import Any

from vllm_power.tools.bench.engine import CHUNK, QWEN2_7B, add_requests, answer, engine, say
from vllm_power.tools.common.results import Row

TELL_EVERY = 10  # seconds


def measure(
    impl: str, requests: int, context: int, output: int, cache_bytes: int | None, seconds: float
) -> Iterator[Row]:
    """One row: the tokens a second, prompts and answers, over ``requests`` equal requests that arrive together.

    cache_bytes: the KV cache; None for all that vLLM can have. Stops after ``seconds``; then the row says
    ``truncated`` and counts the answers, and the prompts that have one, by then.
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
        add_requests(vllm, 1, CHUNK, 8)  # what a first request takes beyond others does not count
        while vllm.has_unfinished_requests():
            vllm.step()
        begin = time.perf_counter()  # vLLM works on the first while the others are handed over
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
    """Step the engine until all is served or ``seconds`` are over since ``begin``; tells the progress.

    answering: requests with at least one token. most_decoding, mean_decoding: sequences that got a token in the same
    step, at most and over time.
    """
    last = told = begin
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
        if now - told > TELL_EVERY:
            told = now
            say(f"{name}: {now - begin:.0f} s, {len(outputs)} in decode, {finished} finished")
    return {
        "finished": finished,
        "answering": len(answering),
        "answered_tokens": answered_tokens,
        "seconds": last - begin,
        "most_decoding": most,
        "mean_decoding": area / (last - begin),
    }


if __name__ == "__main__":
    answer(measure)
