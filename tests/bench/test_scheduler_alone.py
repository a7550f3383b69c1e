"""vLLM's scheduler with reclamation, without a model: no deadlock, more sequences fit, and the cost is small."""

import random

import pytest
from vllm.config import VllmConfig
from vllm.v1.request import Request, RequestStatus

from vllm_power.tools.bench import memory_scheduler
from vllm_power.tools.bench.engine import IMPLS
from vllm_power.tools.bench.scheduler_alone import PAGE, SchedulerAlone, configuration

CONTEXT, OUTPUT = 16_384, 512


def abort(scheduler: SchedulerAlone, request: Request) -> Request:
    """End a request as if its client had disconnected."""
    scheduler.vllm.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    return request


@pytest.fixture(scope="module")
def config():
    settings = {"max_model_len": CONTEXT + OUTPUT, "max_num_batched_tokens": 2048, "max_num_seqs": 64}
    with configuration(IMPLS["power"], enable_prefix_caching=True, **settings) as config:
        yield config


@pytest.mark.parametrize("caching", [True, False], ids=["prefix_caching", "no_prefix_caching"])
@pytest.mark.parametrize("seed", range(2))
def test_a_tight_pool_serves_everything(config: VllmConfig, caching: bool, seed: int) -> None:
    """Sixty requests, some with a shared prefix, some preempted, some aborted, in a pool for the peak of one."""
    generator = random.Random(seed)
    config.cache_config.enable_prefix_caching = caching
    scheduler = SchedulerAlone(config, pages=56)  # the peak of the longest, with a chunk in flight, is 42
    free = scheduler.free_pages
    wanted = {}
    for number in range(60):
        shared = [seed] * generator.choice((0, 0, 0, 0, 300, 9000))
        prompt = shared + [number] * generator.choice((1, 1, 1, 200, 1000, 5000))
        request = scheduler.add(prompt, generator.randint(1, 2000))  # answers grow beyond the reserved pages
        wanted[request] = request.max_tokens
    for step in range(100_000):
        if not scheduler.vllm.requests:
            break
        scheduler.step()
        if step % 500 == 499 and (running := scheduler.vllm.running):
            wanted.pop(abort(scheduler, generator.choice(running)))
    assert not scheduler.vllm.requests, "it does not come to an end"
    assert all(request.num_output_tokens == count for request, count in wanted.items())
    assert 30 < len(wanted) < 60 and scheduler.preemptions > 0
    assert scheduler.free_pages == free


def test_more_sequences_decode_at_once(config: VllmConfig) -> None:
    pages = 4 * (CONTEXT + OUTPUT) // PAGE
    config.cache_config.enable_prefix_caching = False
    at_once, held = memory_scheduler.most_at_once(config, CONTEXT, OUTPUT, pages, requests=100)
    assert at_once > 3 * 4
    assert held <= pages


def test_a_step_costs_about_what_full_attentions_does(config: VllmConfig) -> None:
    """The goal is less than 5% more; the limit leaves room for a busy machine."""
    config.cache_config.enable_prefix_caching = True
    schedulers = {}
    for impl in ("dense", "power"):
        schedulers[impl] = SchedulerAlone(config, 64 * 40, full_attention=impl == "dense")
        for number in range(64):
            schedulers[impl].add([number] * 2000, OUTPUT)
        while schedulers[impl].decoding < 64:
            schedulers[impl].step()
    times = memory_scheduler.in_turns(schedulers, 300, prefill=False)
    assert min(times["power"]) < 1.25 * min(times["dense"])
