"""vLLM's scheduler and KV cache manager without a model: every sampled token is the same.

Admission, KV blocks and preemption do not depend on the sampled tokens, and a step takes microseconds.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm import EngineArgs, SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_power import compat, kv_cache
from vllm_power.metrics.scheduler import CountedScheduler
from vllm_power.tools.bench.engine import TINY, model_folder

PAGE = 256
TOKEN = 5


@contextmanager
def configuration(impl_settings: dict[str, Any], page: int = PAGE, **settings: Any) -> Iterator[VllmConfig]:
    """vLLM's configuration of a server without asynchronous scheduling; ``settings`` are arguments of vllm.LLM."""
    with model_folder(TINY) as folder:
        yield EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            block_size=page,
            async_scheduling=False,
            **impl_settings,
            **settings,
        ).create_engine_config()


class SchedulerAlone:
    """A scheduler over a cache of ``pages`` pages. All layers share the spec that ``config`` gives to a layer."""

    def __init__(self, config: VllmConfig, pages: int, full_attention: bool = False) -> None:
        page = config.cache_config.block_size
        spec = FullAttentionSpec(block_size=page, num_kv_heads=1, head_size=32, dtype=torch.bfloat16)
        if not full_attention:
            if kv_cache.why_not(config) is None:
                spec = kv_cache.reclaiming_spec(spec, config)
            # As in a server. Also applies to schedulers created from ``config`` later.
            compat.extend_scheduler(config, CountedScheduler)
        config.cache_config.num_gpu_blocks = pages
        self.caching = config.cache_config.enable_prefix_caching
        self.vllm: Any = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(pages, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=page,
        )
        self.cached: dict[str, int] = {}  # by request id: the tokens found in the prefix cache
        self.preemptions = 0
        self.decoding = 0  # sequences that got a token in the last step
        self._added = 0
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(page, sha256) if self.caching else None

    def add(self, prompt: list[int], max_tokens: int) -> Request:
        """Add a request."""
        self._added += 1
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(str(self._added), prompt, sampling, None, block_hasher=self._hasher)
        self.vllm.add_request(request)
        return request

    def step(self) -> float:
        """Run one step. Returns the CPU seconds that vLLM's scheduler took."""
        begin = time.thread_time()
        scheduled = self.vllm.schedule()
        middle = time.thread_time()
        answered = self._answer(scheduled)
        again = time.thread_time()
        self.vllm.update_from_output(scheduled, answered)
        end = time.thread_time()
        for new in scheduled.scheduled_new_reqs:
            self.cached[new.req_id] = new.num_computed_tokens
        self.preemptions += len(scheduled.preempted_req_ids or ())
        return middle - begin + end - again

    @property
    def free_pages(self) -> int:
        """Pages that no request holds."""
        return self.vllm.kv_cache_manager.block_pool.get_num_free_blocks()

    def _answer(self, scheduled: SchedulerOutput) -> ModelRunnerOutput:
        """A token for every request whose known tokens are all computed."""
        names = list(scheduled.num_scheduled_tokens)
        requests = [self.vllm.requests[name] for name in names]
        tokens = [[TOKEN] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
        self.decoding = sum(map(len, tokens))
        indices = {name: index for index, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=indices, sampled_token_ids=tokens)
