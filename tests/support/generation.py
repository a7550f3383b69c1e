"""What the tests ask of a running engine; these functions run in its process."""

import resource
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Generated:
    """prompt_logprobs: of each prompt token but the first; tokens, logprobs: what was generated, greedily."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached_tokens: int


def greedy(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: int | Sequence[int] = 1,
    prompt_logprobs: bool = True,
    dense: Sequence[int] = (),
) -> list[Generated]:
    """Greedy continuations of ``prompts``, all handed over at once. vLLM skips its prefix cache for prompt logprobs.

    dense: the numbers of the prompts whose requests ask that all their rows see everything.
    """
    from vllm import SamplingParams

    counts = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0 if prompt_logprobs else None,
            detokenize=False,
            extra_args={"power": "dense"} if number in dense else None,
        )
        for number, count in enumerate(counts)
    ]
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [generated(output) for output in outputs]


def generated(output: Any) -> Generated:
    """A vLLM RequestOutput as plain numbers."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    told = (output.prompt_logprobs or [None])[1:]
    return Generated(
        tokens=tokens,
        logprobs=[told[token].logprob for token, told in zip(tokens, completion.logprobs, strict=True)],
        prompt_logprobs=[
            told[token].logprob for token, told in zip(output.prompt_token_ids[1:], told, strict=False)
        ],
        cached_tokens=output.num_cached_tokens,
    )


def metrics(llm: Any) -> dict[str, float]:
    """The engine's counters and gauges by name, summed over their labels."""
    values: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            values[metric.name] = values.get(metric.name, 0) + metric.value
    return values


def reclaimed(llm: Any) -> int | None:
    """Pages that the engine gave back early so far; None if it does not reclaim."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    counts = [manager.num_reclaimed for manager in managers if hasattr(manager, "num_reclaimed")]
    return sum(counts) if counts else None


def resident_bytes() -> int:
    """Memory of this process, after whatever Python can free is free."""
    import gc

    gc.collect()
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[1]) * resource.getpagesize()
