"""Copies between pages and host memory at the last moment at which a device may make them; also for an engine on a CPU.

vLLM's own worker for OffloadingConnector needs CUDA streams. ``LateSpec`` has another one for its real connector:
``{"spec_name": "LateSpec", "spec_module_path": "support.late_copies"}``.
"""

import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class LateCopies(OffloadingWorker):
    """A copy reads its source some steps after it was submitted, or when the worker waits for it."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.queues: tuple[deque[Any], deque[Any]] = (deque(), deque())  # stores, loads: each in its order
        self.done: list[int] = []
        self.loaded = 0  # pages

    def copy(self, is_store: bool, group_sizes: Sequence[int], pages: Any, chunks: Any) -> None:
        """Copy ``pages`` to ``chunks`` of host memory, or back; those of the first group of layers come first."""
        raise NotImplementedError

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.queues[0].append((job_id, src_spec.group_sizes, src_spec.block_ids, dst_spec.block_ids))
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, **expedited: bool) -> bool:
        self.loaded += len(dst_spec.block_ids)
        self.queues[1].append((job_id, dst_spec.group_sizes, dst_spec.block_ids, src_spec.block_ids))
        return True

    def get_finished(self) -> list[TransferResult]:
        for queue in self.queues:
            while queue and self.dice.random() < 0.4:
                self._copy_next(queue)
        done, self.done = self.done, []
        return [TransferResult(job_id=job, success=True) for job in done]

    def wait(self, job_ids: set[int]) -> None:
        for queue in self.queues:
            while any(job[0] in job_ids for job in queue):
                self._copy_next(queue)

    def _copy_next(self, queue: deque[Any]) -> None:
        job, group_sizes, pages, chunks = queue.popleft()
        assert len(pages) == len(chunks) == sum(group_sizes)
        self.copy(queue is self.queues[0], group_sizes, pages, chunks)
        self.done.append(job)


class LateTensorCopies(LateCopies):
    """Of an engine's KV caches."""

    def __init__(self, caches: CanonicalKVCaches, num_chunks: int) -> None:
        super().__init__(random.Random(0))
        self.refs = caches.group_data_refs
        self.pages = [held.tensor for held in caches.tensors]
        self.host = [
            torch.zeros(num_chunks, held.page_size_bytes, dtype=torch.int8) for held in caches.tensors
        ]

    def copy(self, is_store: bool, group_sizes: Sequence[int], pages: Any, chunks: Any) -> None:
        begin = 0
        for refs, size in zip(self.refs, group_sizes, strict=True):
            of_group = slice(begin, begin + size)
            for number in {ref.tensor_idx for ref in refs}:
                device, host = self.pages[number], self.host[number]
                if is_store:
                    host[chunks[of_group]] = device[pages[of_group]]
                else:
                    device[pages[of_group]] = host[chunks[of_group]]
            begin += size


class LateSpec(CPUOffloadingSpec):
    """vLLM's host memory, with late copies."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> LateTensorCopies:
        if self._worker is None:
            self._worker = LateTensorCopies(kv_caches, self.num_chunks)
        return self._worker
