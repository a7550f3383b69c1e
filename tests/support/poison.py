"""Runs a request step by step, with NaN in every page that the step may not read. In the engine's process."""

from typing import Any

import torch

from support.generation import Generated, generated
from vllm_power.pattern import PATTERN_ROWS, Pattern, RowRule


def greedy_over_poison(
    llm: Any, prompt: list[int], steps: int, pattern: Pattern, rule: RowRule = PATTERN_ROWS
) -> tuple[Generated, int]:
    """The answer to ``prompt``, and how many times a page was poisoned.

    Before each step, the pages of all earlier blocks that none of the step's query blocks sees are filled with NaN,
    and so is vLLM's null page 0. Afterwards a page is restored only if a later query reads it. A page's
    layout depends on the machine's kernel, hence whole pages.
    """
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    caches = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.kv_caches
    page_size = llm.llm_engine.vllm_config.cache_config.block_size
    budget = scheduler.max_num_scheduled_tokens
    last_block = (len(prompt) + steps - 1) // pattern.block_size
    poisonings = 0
    output = None

    engine.add_request(
        "request",
        {"prompt_token_ids": prompt},
        SamplingParams(
            temperature=0, max_tokens=steps, ignore_eos=True, logprobs=0, prompt_logprobs=0, detokenize=False
        ),
    )
    while engine.has_unfinished_requests():
        (request,) = scheduler.requests.values()
        (pages,) = scheduler.kv_cache_manager.get_block_ids(request.request_id) or ([],)
        start = request.num_computed_tokens
        end = min(start + budget, request.num_tokens)
        queries = range(start // pattern.block_size, (end - 1) // pattern.block_size + 1)
        hidden = [k for k in range(queries[0]) if not any(pattern.sees(q, k) for q in queries)]
        if any(rule.sees_everything(row, len(prompt)) for row in range(start, end)):
            hidden = []

        saved = {}
        for block in hidden:
            for page in pages_of(block, pages, page_size, pattern):
                saved[page] = (block, [cache[page].clone() for cache in caches])
        for cache in caches:
            cache[[0, *saved]] = torch.nan
        poisonings += len(saved)

        (output,) = engine.step() or (output,)

        for page, (block, contents) in saved.items():
            later = range(max(block, queries[-1]), last_block + 1)
            if rule.has_dense_rows or any(pattern.sees(query, block) for query in later):
                for cache, content in zip(caches, contents, strict=True):
                    cache[page] = content
    assert output is not None
    return generated(output), poisonings


def pages_of(block: int, pages: list[int], page_size: int, pattern: Pattern) -> list[int]:
    per_block = pattern.block_size // page_size
    return pages[block * per_block : (block + 1) * per_block]
