"""Serves requests while every page that nobody owns holds NaN. In the engine's process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Served:
    """What came of the requests, and how the pool fared.

    answers: for each request, and each of its samples: tokens and logprobs. peak: most pages held at once.
    free_before, free_after: free pages of the pool. preemptions: how often a request was thrown out.
    """

    answers: list[list[tuple[list[int], list[float]]]] = field(default_factory=list)
    peak: int = 0
    free_before: int = 0
    free_after: int = 0
    preemptions: int = 0


def serve(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    n: int = 1,
    abort_after: dict[int, int] | None = None,
    preempt_at: Sequence[int] = (),
) -> Served:
    """Serve ``prompts`` together; request i is aborted after ``abort_after[i]`` steps, if it is named there, and all
    running requests are preempted before the steps ``preempt_at``.

    After each step all free pages that no later prompt may find by their hash become NaN. A page that is handed out
    is zeroed just before its first use, as vLLM's pages are when the server starts.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    poisoned: set[int] = set()
    served = Served(free_before=pool.get_num_free_blocks())
    execute = core.model_executor.execute_model

    def poison() -> None:
        nobodys = {
            b.block_id for b in pool.blocks if b.ref_cnt == 0 and b.block_hash is None and not b.is_null
        }
        free = list(nobodys - poisoned)
        for cache in caches:
            cache[free] = torch.nan
        poisoned.update(free)

    def clean_then_execute(*arguments: Any, **keywords: Any) -> Any:
        used = [page for page in poisoned if pool.blocks[page].ref_cnt > 0]
        for cache in caches:
            cache[used] = 0
        poisoned.difference_update(used)
        return execute(*arguments, **keywords)

    core.model_executor.execute_model = clean_then_execute
    results: dict[str, Any] = {}
    try:
        poison()
        torch.manual_seed(0)  # samples are drawn from the one generator of a CPU
        for index, (prompt, count) in enumerate(zip(prompts, max_tokens, strict=True)):
            sampling = SamplingParams(
                temperature=0 if n == 1 else 1,
                n=n,
                max_tokens=count,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling)
        step = 0
        while engine.has_unfinished_requests():
            for index in [i for i, after in (abort_after or {}).items() if after == step]:
                engine.abort_request([str(index)])
            if step in preempt_at:
                core.scheduler.reset_prefix_cache(reset_running_requests=True)
            for output in engine.step():
                results[output.request_id] = output
            served.preemptions = max(
                served.preemptions, *(r.num_preemptions for r in core.scheduler.requests.values()), 0
            )
            served.peak = max(served.peak, served.free_before - pool.get_num_free_blocks())
            poison()
            step += 1
    finally:
        core.model_executor.execute_model = execute
        for cache in caches:
            cache[list(poisoned)] = 0
    served.free_after = pool.get_num_free_blocks()
    for index in range(len(prompts)):
        if output := results.get(str(index)):
            served.answers.append([_plain(sample) for sample in output.outputs])
    return served


def _plain(sample: Any) -> tuple[list[int], list[float]]:
    tokens = list(sample.token_ids)
    return tokens, [told[token].logprob for token, told in zip(tokens, sample.logprobs, strict=True)]
