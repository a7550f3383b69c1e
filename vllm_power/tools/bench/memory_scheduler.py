"""What reclamation costs vLLM's scheduler: its own time for a step with many sequences, against full attention's.

Two schedulers serve the same requests and take their steps in turns, so that a machine's moods meet both.
"""

import gc
import statistics
from collections.abc import Iterator

from vllm_power.tools.bench.engine import CHUNK, IMPLS, answer
from vllm_power.tools.bench.scheduler_alone import PAGE, SchedulerAlone, configuration
from vllm_power.tools.common.results import Row

LONG = 16 * CHUNK  # the prompt in prefill beside the sequences in decode


def measure(sequences: int, context: int, steps: int) -> Iterator[Row]:
    """A row for each kind of step, with prefix caching and without, and each implementation."""
    for caching in (True, False):
        settings = {
            "max_model_len": LONG + 2 * steps,
            "max_num_batched_tokens": sequences * context,  # to be done with the prompts soon
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
    """{implementation: seconds of each of its ``steps`` steps}; with ``prefill``, a long prompt is always under way."""
    times: dict[str, list[float]] = {impl: [] for impl in schedulers}
    order = list(schedulers)
    prompts = 0
    gc.disable()  # a collection would hit whoever is at it
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


if __name__ == "__main__":
    answer(measure)
