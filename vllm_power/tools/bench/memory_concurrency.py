"""How many long sequences decode at once in the same cache, with reclamation and without it, nobody preempted."""

from bisect import bisect_left
from collections.abc import Iterator

from vllm.config import VllmConfig

from vllm_power.tools.bench.engine import CHUNK, IMPLS, answer
from vllm_power.tools.bench.scheduler_alone import PAGE, SchedulerAlone, configuration
from vllm_power.tools.common.results import Row

MOST = 1024  # sequences that may run
REQUESTS = 64  # for each whole sequence that the cache holds: enough to fill it many times over


def measure(contexts: list[int], output: int, whole_sequences: int) -> Iterator[Row]:
    """A row for each context and implementation, in a cache that holds ``whole_sequences`` without reclamation."""
    for context in contexts:
        for impl in ("power_no_reclaim", "power"):
            settings = {"max_model_len": context + output, "max_num_batched_tokens": CHUNK}
            with configuration(IMPLS[impl], enable_prefix_caching=False, **settings) as config:
                pages = whole_sequences * -(-(context + output) // PAGE)
                decoding, held = most_at_once(config, context, output, pages, REQUESTS * whole_sequences)
            yield {
                "bench": "concurrency",
                "impl": impl,
                "context": context,
                "output": output,
                "value": decoding,
                "unit": "sequences in decode at once, none preempted",
                "cache_pages": pages,
                "cache_sequences": whole_sequences,
                "most_pages_held": held,
                "page": PAGE,
                "chunk": CHUNK,
                "measured_in": "vLLM's scheduler and KV cache manager; the model's tokens are made up",
            }


def most_at_once(config: VllmConfig, context: int, output: int, pages: int, requests: int) -> tuple[int, int]:
    """The most sequences that decode in one step while ``requests`` wait in line, and the most pages held.

    Where that throws sequences out, fewer are let in, until none is.
    """

    def serve(limit: int) -> tuple[int, int, int]:
        config.scheduler_config.max_num_seqs = limit
        scheduler = SchedulerAlone(config, pages + 1)  # vLLM keeps one page as its null page
        for _ in range(requests):
            scheduler.add([7] * context, output)
        decoding = held = 0
        while scheduler.vllm.requests:
            scheduler.step()
            decoding = max(decoding, scheduler.decoding)
            held = max(held, pages - scheduler.free_pages)
        return scheduler.preemptions, decoding, held

    preemptions, decoding, held = serve(MOST)
    if preemptions:
        limits = range(1, decoding + 1)
        limit = limits[bisect_left(limits, True, key=lambda limit: serve(limit)[0] > 0) - 1]
        _, decoding, held = serve(limit)
    return decoding, held


if __name__ == "__main__":
    answer(measure)
