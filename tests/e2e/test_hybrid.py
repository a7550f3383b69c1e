"""Hybrid models: attention next to short convolutions or Mamba-2, for which vLLM enlarges the pages of attention.

The sweep (tests/sweep) holds them to the explicit mask; here their pages are given back, taken away and found again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import generation
from support.engine_worker import Worker
from support.prompts import random_tokens
from sweep import cpu_gaps, tiny

PROMPTS = [random_tokens(1500, 1), random_tokens(900, 2)]
NEW = 6
SETTINGS: dict[str, Any] = {
    "block_size": 32,
    "max_model_len": 2048,
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": True,
    "kv_cache_memory_bytes": 64 << 20,
}
POWER = {"block_size": 64, "window_blocks": 2}

pytestmark = [pytest.mark.slow, pytest.mark.cpu]


@pytest.mark.parametrize(
    ("made_by", "model_type"),
    [("Lfm2ForCausalLM", "lfm2"), ("GraniteMoeHybridForCausalLM", "granitemoehybrid")],
)
def test_reclamation_preemption_and_prefix_hits_change_nothing(
    made_by: str, model_type: str, tmp_path: Path, another_worker: Callable[..., Worker]
) -> None:
    model = tmp_path / "model"
    tiny.save(made_by, made_by, model_type, model)
    worker = another_worker()
    worker.run(cpu_gaps.fill)
    answers = {}
    for reclaim in (True, False):
        power = {"power": POWER | {"reclaim": reclaim}}
        worker.start(model, **SETTINGS, additional_config=power)
        answers[reclaim] = worker.call(serve, ()), worker.call(serve, (3, 7))
        assert worker.call(page_size) % 32 == 0
        assert ((worker.call(generation.reclaimed) or 0) > 0) is reclaim
        (_, _, found), (_, preempted, again) = answers[reclaim]
        assert preempted and not found and again
    expected = answers[False][0][0]
    for outcomes in answers.values():
        for told, _, _ in outcomes:
            for (tokens, logprobs), (right, known) in zip(told, expected, strict=True):
                assert tokens == right
                assert logprobs == pytest.approx(known, abs=1e-4)


def serve(llm: Any, preempt_at: tuple[int, ...]) -> tuple[list[tuple[list[int], list[float]]], int, int]:
    """Serve the prompts at once, all requests preempted before some steps.

    Returns tokens and logprobs of each, how often a request was preempted, and how many tokens were cached.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, results = llm.llm_engine, {}
    scheduler = engine.engine_core.engine_core.scheduler
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    step = preemptions = 0
    while engine.has_unfinished_requests():
        if step in preempt_at:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in engine.step():
            results[output.request_id] = output
        preemptions = max(preemptions, *(r.num_preemptions for r in scheduler.requests.values()), 0)
        step += 1
    told = []
    for number in range(len(PROMPTS)):
        (sample,) = results[str(number)].outputs
        tokens = list(sample.token_ids)
        told.append((tokens, [at[token].logprob for token, at in zip(tokens, sample.logprobs, strict=True)]))
    return told, preemptions, sum(result.num_cached_tokens for result in results.values())


def page_size(llm: Any) -> int:
    return llm.llm_engine.vllm_config.cache_config.block_size
