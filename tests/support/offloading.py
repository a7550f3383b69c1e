"""vLLM's scheduler with its real OffloadingConnector, over pages and host memory that are arrays of integers.

The worker side is vLLM's too, down to the copies (``support.late_copies``). A page is poisoned when it is handed out,
and so is host memory, and each slot that a query sees must hold what belongs there.
"""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm import EngineArgs, SamplingParams
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from support.late_copies import LateCopies
from vllm_power import compat
from vllm_power.dense_requests import is_dense
from vllm_power.kv_cache_spec import PowerAttentionSpec
from vllm_power.metrics.scheduler import CountedScheduler
from vllm_power.offloading import PowerOffloadingScheduler
from vllm_power.scheduler import PowerScheduler
from vllm_power.tools.bench.engine import TINY, model_folder

PAGE, MAX_LEN, CHUNK = 16, 1024, 96
POISON = -1
init_none_hash(sha256)


@contextmanager
def configuration(overlapping: bool = False, power: dict[str, Any] | None = None) -> Iterator[VllmConfig]:
    """vLLM's configuration with OffloadingConnector. overlapping: a step is planned before the last one is settled."""
    with model_folder(TINY | {"max_position_embeddings": MAX_LEN}) as folder:
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            block_size=2 * PAGE,  # the smallest of the kernels
            max_model_len=MAX_LEN,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=6,
            enable_chunked_prefill=True,
            async_scheduling=overlapping,
            attention_backend="power",
            additional_config={"power": {"mode": "trained", **(power or {})}},
            kv_transfer_config=KVTransferConfig(
                kv_connector="OffloadingConnector",
                kv_role="kv_both",
                kv_connector_extra_config={"cpu_bytes_to_use": 1},
            ),
        ).create_engine_config()
        config.cache_config.block_size = PAGE
        config.scheduler_config.async_scheduling = overlapping
        yield config


class LateArrayCopies(LateCopies):
    """Between ``pages`` and ``host``, [number, slot] each. Host memory is poisoned when it is handed out."""

    def __init__(self, pages: np.ndarray, host: np.ndarray, dice: random.Random) -> None:
        super().__init__(dice)
        self.pages, self.host = pages, host

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.host[dst_spec.block_ids] = POISON
        return super().submit_store(job_id, src_spec, dst_spec)

    def copy(self, is_store: bool, group_sizes: Sequence[int], pages: Any, chunks: Any) -> None:
        if is_store:
            self.host[chunks] = self.pages[pages]
        else:
            self.pages[pages] = self.host[chunks]


@dataclass
class Known:
    """What the worker knows of a request. prompt: its tokens. tables: [group], page tables with stale ids."""

    prompt: list[int]
    every_row: bool
    tables: list[list[int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prefixes: list[int] = field(default_factory=list)

    def up_to(self, end: int) -> None:
        """Continue the tokens to at least ``end``: each follows from all before it."""
        while len(self.tokens) < end:
            number = len(self.tokens)
            before = self.prefixes[-1] if number else int(self.every_row)
            token = self.prompt[number] if number < len(self.prompt) else before % 997 + 3
            self.tokens.append(token)
            self.prefixes.append(hash((before, token)) & 0x3FFFFFFFFFFF)


class OffloadedEngine:
    """``pages`` pages and ``host_pages`` pages of host memory. Each group of layers has one spec."""

    def __init__(
        self,
        config: VllmConfig,
        specs: list[AttentionSpec],
        pages: int,
        host_pages: int,
        seed: int = 0,
        caching: bool = True,
    ) -> None:
        extra = config.kv_transfer_config.kv_connector_extra_config
        extra["cpu_bytes_to_use"] = host_pages * 4096 * -(-sum(s.page_size_bytes for s in specs) // 4096)
        config.cache_config.num_gpu_blocks = pages
        config.cache_config.enable_prefix_caching = caching
        self.overlapping = config.scheduler_config.async_scheduling
        compat.extend_scheduler(config, CountedScheduler, PowerScheduler)
        compat.tell_kv_cache_kind(PowerAttentionSpec)
        compat.offload_pages(PowerAttentionSpec, PowerOffloadingScheduler)
        groups = [KVCacheGroupSpec([f"layer.{number}"], spec) for number, spec in enumerate(specs)]
        kv_cache_config = KVCacheConfig(pages, [], groups)
        self.scheduler: Any = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=kv_cache_config,
            structured_output_manager=StructuredOutputManager(config),
            block_size=PAGE,
        )
        self.connector = self.scheduler.connector.connector_scheduler
        self.specs, self.dice = specs, random.Random(seed)
        self.pages = np.full((pages, PAGE), POISON)
        self.copies = LateArrayCopies(self.pages, np.full((host_pages, PAGE), POISON), self.dice)
        offloading = SimpleNamespace(replicated_layout=False)
        self.worker = OffloadingConnectorWorker(offloading, config, kv_cache_config)
        self.worker.worker = self.copies
        self.known: dict[str, Known] = {}
        self.cached: dict[str, int] = {}  # by request id: the tokens that were not computed for its prompt
        self.preemptions = 0
        self._added = 0
        self._handed_out: list[int] = []
        self._to_settle: deque[Any] = deque()
        self._hasher = get_request_block_hasher(PAGE, sha256)
        self._squeezed: list[Any] = []
        self._squeezed_for = 0
        self._pool = pool = self.scheduler.kv_cache_manager.block_pool
        self._hand_out = pool.get_new_blocks
        pool.get_new_blocks = self._noting_pages

    @property
    def free_pages(self) -> int:
        return self._pool.get_num_free_blocks()

    def squeeze(self, steps: int) -> None:
        """Leave no page free for some steps, so that vLLM preempts requests."""
        self._squeezed += self._hand_out(self.free_pages)
        self._squeezed_for = steps

    def add(self, prompt: list[int], max_tokens: int, dense: bool = False) -> Request:
        self._added += 1
        sampling = SamplingParams(
            max_tokens=max_tokens, ignore_eos=True, extra_args={"power": "dense"} if dense else None
        )
        request = Request(str(self._added), prompt, sampling, None, block_hasher=self._hasher)
        self.known[request.request_id] = Known(list(prompt), is_dense(sampling))
        self.scheduler.add_request(request)
        return request

    def abort(self, request: Request) -> None:
        self.scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def forget(self, keys: list[bytes]) -> None:
        """Drop pages from host memory, except those that are being copied."""
        host = self.connector.manager
        for key in keys:
            chunk = host._policy.get(key)
            if chunk is not None and chunk.ref_cnt == 0:
                host._policy.remove(key)
                host._free_chunk(chunk)
                host._num_evictable_cache_chunks -= 1

    def step(self) -> None:
        self._squeezed_for -= 1
        if self._squeezed_for < 0:
            self._pool.free_blocks(self._squeezed)
            self._squeezed = []
        planned = self.scheduler.schedule()
        self.preemptions += len(planned.preempted_req_ids or ())
        handed_out, self._handed_out = self._handed_out, []
        self._to_settle.append((planned, self._execute(planned, handed_out)))
        while len(self._to_settle) > (1 if self.overlapping and planned.total_num_scheduled_tokens else 0):
            self.scheduler.update_from_output(*self._to_settle.popleft())

    def finish(self) -> None:
        """Step until nothing is left to do, then check that nothing was leaked."""
        for _ in range(20_000):
            if not self.scheduler.has_requests():
                break
            self.step()
        assert not self.scheduler.has_requests(), "waits for ever"
        assert self.free_pages == len(self.pages) - 1
        assert not self.scheduler.requests
        for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers:
            assert not manager.req_to_blocks
            assert not getattr(manager, "requests", None) and not getattr(manager, "returned", None)
        connector = self.connector
        assert not connector._jobs and not connector._req_status and not connector._block_id_to_pending_jobs
        assert not connector._chunks_being_loaded
        host = connector.manager
        assert host._num_write_pending_chunks == 0
        assert host._num_allocated_chunks - len(host._free_list) == host._num_evictable_cache_chunks
        assert host._num_allocated_chunks <= len(self.copies.host)

    def _noting_pages(self, number: int) -> list[Any]:
        blocks = self._hand_out(number)
        self._handed_out += [block.block_id for block in blocks]
        return blocks

    # --- the worker ---------------------------------------------------------------------------------------------

    def _execute(self, planned: Any, handed_out: list[int]) -> ModelRunnerOutput:
        meta = planned.kv_connector_metadata
        self.worker.handle_preemptions(meta)
        self.pages[handed_out] = POISON
        self.worker.start_kv_transfers(meta)
        starts = self._update_tables(planned)
        names, sampled = [], []
        for name, number in planned.num_scheduled_tokens.items():
            names.append(name)
            end = starts[name] + number
            self._run(self.known[name], starts[name], end)
            sampled.append(
                [] if self.scheduler.requests[name].is_prefill_chunk else [self.known[name].tokens[end]]
            )
        self.worker.prepare_store_kv(meta)
        _, received = self.worker.get_finished(planned.finished_req_ids)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(
                finished_recving=received, kv_connector_worker_meta=self.worker.build_connector_worker_meta()
            ),
        )

    def _update_tables(self, planned: Any) -> dict[str, int]:
        starts = {}
        for new in planned.scheduled_new_reqs:
            self.known[new.req_id].tables = [list(ids) for ids in new.block_ids]
            starts[new.req_id] = self.cached[new.req_id] = new.num_computed_tokens
        cached = planned.scheduled_cached_reqs
        for name, ids, start in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            starts[name] = start
            if name in cached.resumed_req_ids:
                self.known[name].tables = [list(group) for group in ids]
            elif ids is not None:
                for table, new in zip(self.known[name].tables, ids, strict=True):
                    table += new
        return starts

    def _run(self, known: Known, start: int, end: int) -> None:
        known.up_to(end + 1)
        prefixes = np.array(known.prefixes[:end])
        for group, (spec, table) in enumerate(zip(self.specs, known.tables, strict=True)):
            truth = prefixes * 8 + group
            slots = np.array(table)[np.arange(end) // PAGE] * PAGE + np.arange(end) % PAGE
            held = self.pages.reshape(-1)
            held[slots[start:]] = truth[start:]
            self.pages[0] = POISON  # the null page
            wrong = held[slots] != truth
            assert not wrong[self._seen(spec, known, start, end)].any()

    def _seen(self, spec: AttentionSpec, known: Known, start: int, end: int) -> np.ndarray:
        if not isinstance(spec, PowerAttentionSpec) or known.every_row:
            return np.arange(end)
        size = spec.pattern.block_size
        rows = range(start // size, (end - 1) // size + 1)
        tail = spec.dense_tail and start < len(known.prompt) and end > len(known.prompt) - spec.dense_tail
        blocks = {block for row in rows for block in spec.pattern.visible_blocks(row)}
        return np.arange(end) if tail else np.flatnonzero(np.isin(np.arange(end) // size, list(blocks)))
