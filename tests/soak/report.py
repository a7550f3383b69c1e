"""What must hold after a soak, and its figures."""

import platform
from collections import Counter

import psutil

from soak.memory import MIB, curve, growth
from soak.run import Soaked
from soak.served import metric

# Measured over 200 s: 14.5 for the engine and 3.3 for the API server, while their caches still fill. A leak of 160 kB
# per request exceeds this after 200 requests, in two minutes; a leak of 16 kB in half an hour.
GROWTH = 32 * MIB


def figures(soaked: Soaked) -> dict[str, object]:
    def counted(name: str) -> int:
        return int(metric(soaked.metrics, name))

    lengths = [len(outcome.request.prompt) for outcome in soaked.outcomes]
    return {
        "machine": f"{psutil.cpu_count()} cores, {psutil.virtual_memory().total >> 30} GiB, {platform.machine()}",
        "seconds of load": round(soaked.seconds),
        "requests": len(soaked.outcomes),
        "answered": sum(outcome.answered for outcome in soaked.outcomes),
        "prompt lengths": f"{len(set(lengths))} different, {min(lengths)} to {max(lengths)}",
        "how clients ended": dict(
            Counter(outcome.request.cut.value for outcome in soaked.outcomes if not outcome.answered)
        ),
        "samples scored alone": len(soaked.differences),
        "largest difference of a log-probability": max(one.logprobs for one in soaked.differences),
        "preemptions": counted("vllm:num_preemptions_total"),
        "prefix cache hits (tokens)": counted("vllm:prefix_cache_hits_total"),
        "drafts accepted (tokens)": counted("vllm:spec_decode_num_accepted_tokens_total"),
        "drafts (tokens)": counted("vllm:spec_decode_num_draft_tokens_total"),
        "pages reclaimed": counted("vllm_power_kv_blocks_reclaimed_total"),
        "polls": soaked.polls,
        "engine (MiB over time)": curve(soaked.memory.engine),
        "API server (MiB over time)": curve(soaked.memory.api),
        "growth (MiB), engine and API server": [
            round(growth(sizes) / MIB, 1) for sizes in (soaked.memory.engine, soaked.memory.api)
        ],
    }


def failures(soaked: Soaked) -> list[str]:
    """What does not hold, in words; empty if all does."""
    found = [f"a request failed: {outcome.error}" for outcome in soaked.outcomes if outcome.error]
    found += [
        f"an answer is not that of the request alone: {difference}"
        for difference in soaked.differences
        if not difference.tolerable
    ]
    for name in ("vllm:kv_cache_usage_perc", "vllm_power_kv_blocks_live", "vllm_power_sequences_running"):
        if left := metric(soaked.metrics, name):
            found.append(f"{name} is {left} when nothing runs")
    for name in (
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_hits_total",
        "vllm:spec_decode_num_accepted_tokens_total",
        "vllm_power_kv_blocks_reclaimed_total",
    ):
        if not metric(soaked.metrics, name):
            found.append(f"{name} is 0: the load did not do what it is for")
    for who, sizes in (("engine", soaked.memory.engine), ("API server", soaked.memory.api)):
        if growth(sizes) > GROWTH:
            found.append(f"the {who} grew by {growth(sizes) / MIB:.0f} MiB: {curve(sizes)}")
    return found
