"""OffloadingConnector with reclamation: dead pages wait in host memory, and a later turn gets back what it can see.

vLLM's connector copies a page to host memory from the step on in which its last token is computed. It has two kinds of
KV cache groups. Pages of full attention are held until their request ends, so it watches for their reuse only from then
on. Pages of a sliding window may be returned earlier: from the moment a copy is planned, a step that reuses such a page
first waits for the copy, and a page that was reused before its copy was planned is not copied. Our pages need the
second kind. To the connector, our groups are therefore sliding windows as long as the longest sequence.

What differs from a window is where the holes are:

- A look-up skips pages that no query after the hit can see. Host memory may have evicted them.
- Pages are allocated (``kv_cache``) and loaded only where a query after the hit can see them. The others count as used
  all the same, so that host memory keeps them for other branches of the conversation.
- Hits end at a page, before the last token of the prompt.

Written against vllm/distributed/kv_transfer/kv_connector/v1/offloading/scheduler.py of vLLM 0.32 and 0.33.
"""

import math
from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestOffloadState,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, get_offload_group_idx
from vllm.v1.request import Request

from vllm_power.kv_cache_spec import PowerAttentionSpec
from vllm_power.prefix_hits import longest_hits


class PowerOffloadingScheduler(OffloadingConnectorScheduler):
    """vLLM's, for models with any groups of ours. Needs one page per chunk, and no group that drafts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups = self.config.kv_group_configs
        self.specs = {
            group.group_idx: group.kv_cache_spec
            for group in groups
            if isinstance(group.kv_cache_spec, PowerAttentionSpec)
        }
        self.tokens_per_hit = math.lcm(*(group.tokens_per_chunk for group in groups))

    def _lookup(self, req_status: RequestOffloadState, max_num_new_tokens: int | None = None) -> int | None:
        if self.specs:
            cached = req_status.num_locally_computed_tokens
            end = (req_status.req.num_tokens - 1) // self.tokens_per_hit * self.tokens_per_hit
            if end <= cached:
                return 0
            # vLLM takes one token off again, the last of the prompt.
            most = end + 1 - cached
            max_num_new_tokens = most if max_num_new_tokens is None else min(most, max_num_new_tokens)
        return super()._lookup(req_status, max_num_new_tokens)

    def _sliding_window_lookup(
        self,
        keys: Sequence[OffloadKey],
        sliding_window_size: int,
        req_context: ReqContext,
        initial_window_size: int | None = None,
    ) -> int | None:
        """The longest hit that ends within the pages of ``keys``, in pages from the first of them on.

        None if a page of it is not ready yet. ``keys`` follow one another, and all earlier pages that a query after
        ``keys[0]`` can see are in the device's prefix cache.
        """
        spec = self.specs.get(get_offload_group_idx(keys[0])) if keys else None
        if spec is None:
            return super()._sliding_window_lookup(keys, sliding_window_size, req_context, initial_window_size)
        found: dict[int, LookupResult] = {}

        def lookup(page: int) -> LookupResult | None:
            if page not in found:
                found[page] = self.manager.lookup(keys[page], req_context)
            return None if found[page] is LookupResult.MISS else found[page]

        # A key's position is where its page ends.
        first = (req_context.get_offload_key_position(keys[0]) or 0) // spec.block_size - 1
        needed_by_request = spec.needed_by(self._req_status[req_context.req_id].req)
        needed_until = [until - first for until in needed_by_request[first : first + len(keys)]]
        _, hit, _ = longest_hits(lookup, len(keys), needed_until)
        if any(needed_until[page] > hit and found[page] is not LookupResult.HIT for page in range(hit)):
            return None
        return hit

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Plan the load of ``num_external_tokens`` tokens into those of their pages that are not null.

        vLLM loads all pages from the first one on that is not null. Therefore the null pages are put before the others,
        with their keys.
        """
        status = self._req_status[request.request_id]
        begin = status.num_locally_computed_tokens
        tables = list(blocks.blocks)
        keys = [group.offload_keys for group in status.group_states]
        for config, group in zip(self.config.kv_group_configs, status.group_states, strict=True):
            if config.group_idx not in self.specs:
                continue
            table, page_size = tables[config.group_idx], config.tokens_per_block
            skipped = [key for key, page in zip(group.offload_keys, table, strict=False) if page.is_null]
            self.manager.touch(skipped, status.req_context)
            if not num_external_tokens:
                continue
            loaded = range(begin // page_size, (begin + num_external_tokens) // page_size)
            order = [*range(loaded.start), *sorted(loaded, key=lambda number: not table[number].is_null)]
            tables[config.group_idx] = [table[number] for number in order] + list(table[loaded.stop :])
            group.offload_keys = [group.offload_keys[number] for number in order]
        try:
            super().update_state_after_alloc(request, KVCacheBlocks(tuple(tables)), num_external_tokens)
        finally:
            for group, its_keys in zip(status.group_states, keys, strict=True):
                group.offload_keys = its_keys

    def reset_cache(self) -> None:
        """As vLLM's, but pages that were copied are not copied again: they may belong to other requests by now."""
        for status in self._req_status.values():
            for config, group in zip(self.config.kv_group_configs, status.group_states, strict=True):
                if config.group_idx in self.specs:
                    copied = min(group.next_stored_chunk_idx, len(group.block_ids))
                    group.block_ids[:copied] = [0] * copied
        super().reset_cache()
