"""The parts of ``vllm-power bench memory`` that run vLLM's scheduler alone: concurrency, scheduler, hits."""

import gc
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

from vllm.config import VllmConfig

from vllm_power.tools.bench import prefix_hits
from vllm_power.tools.bench.engine import CHUNK, IMPLS
from vllm_power.tools.bench.scheduler_alone import PAGE, SchedulerAlone, configuration
from vllm_power.tools.common.apart import answer
from vllm_power.tools.common.results import Row

MAX_SEQUENCES = 1024  # limit on running sequences
REQUESTS_PER_SEQUENCE = 64  # per whole sequence that the cache holds: enough to fill it many times over
LONG = 16 * CHUNK  # prompt in prefill next to the sequences in decode


def concurrency(contexts: list[int], output: int, whole_sequences: int) -> Iterator[Row]:
    """How many sequences decode at once: one row per context and implementation.

    The cache holds ``whole_sequences`` sequences without reclamation.
    """
    for context in contexts:
        for impl in ("power_no_reclaim", "power"):
            settings = {"max_model_len": context + output, "max_num_batched_tokens": CHUNK}
            with configuration(IMPLS[impl], enable_prefix_caching=False, **settings) as config:
                pages = whole_sequences * -(-(context + output) // PAGE)
                requests = REQUESTS_PER_SEQUENCE * whole_sequences
                decoding, held = most_at_once(config, context, output, pages, requests)
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
    """The most sequences that decode in one step while ``requests`` wait, and the most pages held.

    If sequences are preempted, the limit on running sequences is lowered until none is.
    """

    def serve(limit: int) -> tuple[int, int, int]:
        config.scheduler_config.max_num_seqs = limit
        scheduler = SchedulerAlone(config, pages + 1)  # vLLM reserves one page as its null page
        for _ in range(requests):
            scheduler.add([7] * context, output)
        decoding = held = 0
        while scheduler.vllm.requests:
            scheduler.step()
            decoding = max(decoding, scheduler.decoding)
            held = max(held, pages - scheduler.free_pages)
        return scheduler.preemptions, decoding, held

    preemptions, decoding, held = serve(MAX_SEQUENCES)
    if preemptions:
        limits = range(1, decoding + 1)
        limit = limits[bisect_left(limits, True, key=lambda limit: serve(limit)[0] > 0) - 1]
        _, decoding, held = serve(limit)
    return decoding, held


def scheduler_time(sequences: int, context: int, steps: int) -> Iterator[Row]:
    """The scheduler's own time per step, against full attention's: one row per kind of step and implementation.

    Both schedulers serve the same requests and take their steps in turns, so that noise of the machine affects both.
    """
    for caching in (True, False):
        settings = {
            "max_model_len": LONG + 2 * steps,
            "max_num_batched_tokens": sequences * context,  # to finish the prompts quickly
            "max_num_seqs": sequences + 1,
            "enable_prefix_caching": caching,
        }
        with configuration(IMPLS["power"], **settings) as config:
            pages = (sequences * (context + 4 * steps) + 2 * LONG) // PAGE
            schedulers = {
                impl: SchedulerAlone(config, pages, full_attention=impl == "dense")
                for impl in ("dense", "power")
            }
        for scheduler in schedulers.values():
            for number in range(sequences):
                scheduler.add([number] + [7] * (context - 1), 4 * steps)
            while scheduler.decoding < sequences:
                scheduler.step()
        for work in ("decode", "decode and prefill"):
            times = in_turns(schedulers, steps, prefill=work != "decode")
            for impl, seconds in times.items():
                yield {
                    "bench": "scheduler_step",
                    "impl": impl,
                    "context": context,
                    "output": 4 * steps,
                    "value": 1e3 * statistics.median(seconds),
                    "unit": "ms",
                    "batch": sequences,
                    "work": work,
                    "prefix_caching": caching,
                    "n": len(seconds),
                    "page": PAGE,
                }


def in_turns(schedulers: dict[str, SchedulerAlone], steps: int, prefill: bool) -> dict[str, list[float]]:
    """{implementation: seconds per step}, ``steps`` of each; ``prefill`` keeps a long prompt in prefill throughout."""
    times: dict[str, list[float]] = {impl: [] for impl in schedulers}
    order = list(schedulers)
    prompts = 0
    gc.disable()  # a collection would be charged to one of the two
    for step in range(steps):
        if prefill and step % (LONG // CHUNK) == 0:
            prompts += 1
            for scheduler in schedulers.values():
                scheduler.vllm.max_num_scheduled_tokens = CHUNK
                scheduler.add([-prompts] + [7] * (LONG - 1), 1)
        for impl in order:
            times[impl].append(schedulers[impl].step())
        order.reverse()
        if step % 100 == 0:
            gc.collect()
    gc.enable()
    return times


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "concurrency": concurrency,
    "scheduler": scheduler_time,
    "hits": prefix_hits.measure,
}


def measure(part: str, *arguments: Any) -> Iterator[Row]:
    """The rows of one of ``PARTS``."""
    return PARTS[part](*arguments)


if __name__ == "__main__":
    answer(measure)
