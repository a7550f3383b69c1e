"""Serves requests while every page that nobody holds is NaN. In the engine's process."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Served:
    """What came of the requests, and how the pool fared.

    answers: for each request, and each of its samples: tokens and logprobs. peak: most pages held at once.
    free_before, free_after: free pages of the pool. preemptions: how often a request was thrown out. cached: for each
    request, the tokens of its prompt that were found in the prefix cache.
    """

    answers: list[list[tuple[list[int], list[float]]]] = field(default_factory=list)
    peak: int = 0
    free_before: int = 0
    free_after: int = 0
    preemptions: int = 0
    cached: list[int] = field(default_factory=list)


class Poison:
    """NaN in every free page and in the null page, for as long as nobody holds them.

    A page that is handed out is zeroed before its first use, as vLLM's pages are when the server starts; one that is
    found by its hash gets its contents back: only a hit may make it readable again.
    """

    def __init__(self, pool: Any, caches: list[torch.Tensor]) -> None:
        self.pool, self.caches = pool, caches
        self.contents: dict[
            int, tuple[Any, list[torch.Tensor]]
        ] = {}  # of the poisoned pages: hash and what it held

    def fill(self) -> None:
        """Poison the pages that are free by now."""
        free = [b for b in self.pool.blocks if b.ref_cnt == 0 and b.block_id not in self.contents]
        for block in free:
            hashed = block.block_hash is not None
            held = [cache[block.block_id].clone() for cache in self.caches] if hashed else []
            self.contents[block.block_id] = block.block_hash, held
        for cache in self.caches:
            cache[[block.block_id for block in free]] = torch.nan

    def clean(self, everything: bool = False) -> None:
        """Make the pages that are held by now usable, or all pages."""
        blocks = self.pool.blocks
        for page in [p for p in self.contents if everything or (blocks[p].ref_cnt and not blocks[p].is_null)]:
            block_hash, held = self.contents.pop(page)
            found = held and blocks[page].block_hash == block_hash
            for number, cache in enumerate(self.caches):
                cache[page] = held[number] if found else 0


def serve(
    llm: Any,
    prompts: Sequence[list[int]],
    max_tokens: Sequence[int],
    n: int | Sequence[int] = 1,
    abort_after: dict[int, int] | None = None,
    preempt_at: Sequence[int] = (),
    dense: Sequence[int] = (),
) -> Served:
    """Serve ``prompts`` together, with ``n`` samples of each; request i is aborted after ``abort_after[i]`` steps, if
    it is named there, and all running requests are preempted before the steps ``preempt_at``. Those of ``dense`` ask
    that all their rows see everything.

    All pages that nobody holds are NaN in every step.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    caches = core.model_executor.driver_worker.worker.model_runner.kv_caches
    poison = Poison(pool, caches)
    served = Served(free_before=pool.get_num_free_blocks())
    execute = core.model_executor.execute_model

    def clean_then_execute(*arguments: Any, **keywords: Any) -> Any:
        poison.clean()
        return execute(*arguments, **keywords)

    core.model_executor.execute_model = clean_then_execute
    results: dict[str, Any] = {}
    try:
        poison.fill()
        torch.manual_seed(0)  # samples are drawn from the one generator of a CPU
        samples = [n] * len(prompts) if isinstance(n, int) else n
        for index, (prompt, count, n) in enumerate(zip(prompts, max_tokens, samples, strict=True)):
            sampling = SamplingParams(
                temperature=0 if n == 1 else 1,
                n=n,
                max_tokens=count,
                ignore_eos=True,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={"power": "dense"} if index in dense else None,
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
            poison.fill()
            step += 1
    finally:
        core.model_executor.execute_model = execute
        poison.clean(everything=True)
    served.free_after = pool.get_num_free_blocks()
    for index in range(len(prompts)):
        if output := results.get(str(index)):
            served.answers.append([_plain(sample) for sample in output.outputs])
            served.cached.append(output.num_cached_tokens)
    return served


def _plain(sample: Any) -> tuple[list[int], list[float]]:
    tokens = list(sample.token_ids)
    return tokens, [told[token].logprob for token, told in zip(tokens, sample.logprobs, strict=True)]
