"""Exact reclamation: a page is returned to vLLM's pool when no later query of its request can see a block in it.

vLLM asks a layer's backend class for its KV cache spec and looks up the manager of that spec in its registry. Our spec
is a separate kind, neither full attention (prefix hits have holes) nor a sliding window (the holes are in the middle).
The last query of a request is known: prompt plus max_tokens, at most max_model_len. Freed blocks keep their hash until
vLLM reuses them, so later prompts may still find them. They are reused as late as if they had been held (``eviction``).

Written against vllm/v1/core/single_type_kv_cache_manager.py and vllm/v1/kv_cache_spec_registry.py.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_power import compat, connectors, options
from vllm_power.dense_requests import is_dense
from vllm_power.eviction import Claim, EvictionOrder
from vllm_power.kv_cache_spec import PowerAttentionSpec, most_tokens
from vllm_power.pattern import ENDLESS
from vllm_power.prefix_hashes import are_dense_request
from vllm_power.prefix_hits import longest_hits


@dataclass(slots=True)
class _Request:
    """What the manager records about a request that holds pages. Most steps reach neither of the last two marks.

    num_tokens: the maximum number of its tokens. kept_until: blocks live at least until this many tokens are settled.
    num_null: null pages in its table. query_block: all queries before this block are settled. next_release: the number
    of settled tokens at which the next block is settled. next_full_page: the number of hashed tokens at which the next
    page is full and can be found by its hash.
    """

    num_tokens: int
    kept_until: int = 0
    num_null: int = 0
    query_block: int = 0
    next_release: int = 0
    next_full_page: int = 0


class PowerAttentionManager(SingleTypeKVCacheManager):
    """Frees the dead blocks of each request, even in the middle of its table, as its queries advance."""

    kv_cache_spec: PowerAttentionSpec

    def __init__(self, kv_cache_spec: PowerAttentionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.prefix_caching: bool = kwargs["enable_caching"]
        self.requests: dict[str, _Request] = {}
        # The pages that a request has returned, by their number in its table, while it runs.
        self.returned: defaultdict[str, dict[int, Claim]] = defaultdict(dict)
        self.order: EvictionOrder | None = None
        if self.prefix_caching:
            self.order = compat.order_evictions(self.block_pool, EvictionOrder)
        self.known_requests: Mapping[str, Request] = {}  # those of the scheduler, by their ids
        self.num_reclaimed = 0  # pages returned early, of all requests so far

    # --- what vLLM calls ----------------------------------------------------------------------------------------

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the pages that no query from ``processed_computed_tokens`` on sees. Called before every allocation."""
        known = self.requests.get(request_id)
        if known is None:
            compat.pass_request_to(self)
        elif processed_computed_tokens >= max(known.next_release, known.kept_until):
            self._release(request_id, known, processed_computed_tokens)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        known = self.requests.get(request.request_id) or self._meet(request)
        if not self.prefix_caching:
            return
        # With a drafter, vLLM 0.33 hashes a block only when the tokens after it are known.
        hashed = min(num_tokens, len(request.block_hashes) * self.block_pool.hash_block_size)
        if hashed >= known.next_full_page:
            super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)
            known.next_full_page = (hashed // self.block_size + 1) * self.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """As vLLM's; with ``apply_admission_cap``, at most the pages that the request still needs up to its peak."""
        needed = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks and self._seen_after(request_id, new_computed_blocks, total_computed_tokens),
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            False,
            prefill_end,
        )
        if total_computed_tokens > num_local_computed_tokens:  # a KV connector loads the rest
            needed -= self._to_load(request_id, num_local_computed_tokens, total_computed_tokens).count(False)
        if not apply_admission_cap or self._keeps_all(request_id):
            return needed
        known = self.requests.get(request_id) or self._unmet(request_id)
        peak = self.kv_cache_spec.peak_pages(known.query_block, known.num_tokens)
        held = len(self.req_to_blocks.get(request_id, ())) - known.num_null
        return min(needed, max(peak - held, 0))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """As vLLM's, but the request holds only those pages of its hit that a query after it can see."""
        num_computed_tokens = num_local_computed_tokens + num_external_computed_tokens
        seen = self._seen_after(request_id, new_computed_blocks, num_computed_tokens)
        for number, (page, kept) in enumerate(zip(new_computed_blocks, seen, strict=True)):
            if kept.is_null and not page.is_null:
                self._claim(request_id, number, page)
        super().add_local_computed_blocks(
            request_id, seen, num_local_computed_tokens, num_external_computed_tokens
        )

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Pages for what a KV connector loads: only those that a query after it can see."""
        num_computed_tokens = num_local_computed_tokens + num_external_computed_tokens
        to_load = self._to_load(request_id, num_local_computed_tokens, num_computed_tokens)
        pages = self.block_pool.get_new_blocks(sum(to_load))
        if self._record_new_block_ids and record_for_zeroing:
            self.new_block_ids += [page.block_id for page in pages]
        following = iter(pages)
        self.req_to_blocks[request_id] += [next(following) if load else self._null_block for load in to_load]

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's, with all pages that the request returned and that were not reused since: one order for all."""
        self.requests.pop(request_id, None)
        if self.order is not None:
            pages = self.req_to_blocks.get(request_id, [])
            for number, claim in self.returned.pop(request_id, {}).items():
                pages[number] = self.order.hold_again(claim) or self._null_block
        # Last, because vLLM 0.33 cuts the null pages off the start: then the numbers are no longer those of the table.
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: PowerAttentionSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest prefix whose pages are all cached, as far as a query after it (up to max_model_len) can see them.

        The result also has the cached pages that no query after the hit sees; pages that are not cached are null.
        """
        block_hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        page_size = kv_cache_spec.block_size
        cached, longest, before = longest_hits(
            lambda page: block_pool.get_cached_block(block_hashes[page], kv_cache_group_ids),
            min(max_length // page_size, len(block_hashes)),
            kv_cache_spec.needed_until(are_dense_request(block_hashes)),
            alignment_tokens // math.gcd(alignment_tokens, page_size),
        )
        hit = before if drop_eagle_block else longest
        return tuple(
            [pages[group] if pages else block_pool.null_block for pages in cached[:hit]]
            for group in range(len(kv_cache_group_ids))
        ), hit * page_size

    # --- helpers ------------------------------------------------------------------------------------------------

    def _keeps_all(self, request_id: str) -> bool:
        """Whether the request asked that all its rows see everything, so that none of its blocks dies."""
        request = self.known_requests.get(request_id) if self.kv_cache_spec.dense_requests else None
        return request is not None and is_dense(request.sampling_params)

    def _meet(self, request: Request) -> _Request:
        """Record the maximum length of a request at its first allocation. Pages that its prefix hit skips are null."""
        spec = self.kv_cache_spec
        limit, kept_until = most_tokens(request, spec.max_model_len), 0
        if spec.dense_tail:  # a resumable request may get more prompt later
            kept_until = (
                spec.max_model_len if getattr(request, "resumable", False) else request.num_prompt_tokens
            )
        if self._keeps_all(request.request_id):
            kept_until = ENDLESS
        num_null = sum(page.is_null for page in self.req_to_blocks[request.request_id])
        self.requests[request.request_id] = met = _Request(limit, kept_until, num_null)
        self.num_cached_block.setdefault(
            request.request_id, 0
        )  # lets vLLM take its shorter path for running requests
        self.enable_caching = self.prefix_caching
        return met

    def _seen_after(
        self, request_id: str, pages: Sequence[KVCacheBlock], num_tokens: int
    ) -> list[KVCacheBlock]:
        """The pages of a hit of ``num_tokens`` tokens, null for those that no query after it can see."""
        # Not those of this request alone: it takes milliseconds for each new length.
        needed_until = self.kv_cache_spec.needed_until(self._keeps_all(request_id))
        return [
            page if until * self.block_size > num_tokens else self._null_block
            for page, until in zip(pages, needed_until, strict=False)
        ]

    def _to_load(self, request_id: str, num_local_tokens: int, num_tokens: int) -> list[bool]:
        """For each page between a local hit and the end of what a KV connector loads: whether a later query sees it."""
        needed_until = self.kv_cache_spec.needed_by(self.known_requests[request_id])
        pages = slice(-(-num_local_tokens // self.block_size), -(-num_tokens // self.block_size))
        return [until * self.block_size > num_tokens for until in needed_until[pages]]

    def _unmet(self, request_id: str) -> _Request:
        """Of a request that has no pages yet, or waits for a KV connector to load them."""
        num_null = sum(page.is_null for page in self.req_to_blocks.get(request_id, ()))
        return _Request(self.kv_cache_spec.max_model_len, num_null=num_null)

    def _claim(self, request_id: str, number: int, page: KVCacheBlock) -> None:
        if self.order is not None and page.block_hash is not None:
            self.returned[request_id][number] = self.order.claim(page)

    def _release(self, request_id: str, request: _Request, settled_tokens: int) -> None:
        """Free the pages whose last block died since the last call."""
        spec = self.kv_cache_spec
        block_size = spec.pattern.block_size
        query_block = settled_tokens // block_size
        lives = spec.lifetimes(request.num_tokens)
        pages = self.req_to_blocks[request_id]
        holds_one_block = block_size % spec.block_size == 0
        freed = []
        for dead in chain.from_iterable(lives.dying_after[request.query_block : query_block]):
            for page in spec.pages_of(dead):
                if page >= len(pages) or pages[page].is_null:
                    continue
                if holds_one_block or spec.last_reader(page, lives.last) < query_block:
                    self._claim(request_id, page, pages[page])
                    freed.append(pages[page])
                    pages[page] = self._null_block
        self.block_pool.free_blocks(freed)
        request.query_block = query_block
        request.next_release = (query_block + 1) * block_size
        request.num_null += len(freed)
        self.num_reclaimed += len(freed)


KVCacheSpecRegistry._ensure_registered()  # otherwise the registry would never get vLLM's own specs
KVCacheSpecRegistry.register(
    PowerAttentionSpec, PowerAttentionManager, uniform_type_base_spec=PowerAttentionSpec
)


def why_not(vllm_config: VllmConfig) -> str | None:
    """Why this configuration does not return blocks early; None if it does."""
    asked = options.of_config(vllm_config)
    if not asked.reclaim:
        return "the option reclaim is false"
    if reason := connectors.why_not(vllm_config):
        return reason
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "--disable-hybrid-kv-cache-manager leaves only full attention"
    if asked.effective_pattern.name == "full":
        return "the pattern full reads every block to the end"
    if asked.rows.dense_decode:
        return 'generated tokens see every block (decode is "dense")'
    return None


def backend_of_engine(
    backend: type[AttentionBackend], vllm_config: VllmConfig, kernel_pages: list[int], reclaims: bool
) -> type[AttentionBackend]:
    """``backend`` for the layers of one engine that run the pattern.

    kernel_pages: the page sizes that its kernels may see. vLLM splits its own pages into the largest that fits.
    reclaims: whether blocks are returned early.

    vLLM asks a layer's backend class for the layer's spec and the kernels' pages, without the configuration. So each
    engine has a class of its own, by the same name: vLLM groups layers by it.
    """

    def customize_spec(cls: type[AttentionBackend], spec: AttentionSpec) -> AttentionSpec:
        return reclaiming_spec(spec, vllm_config) if reclaims else spec

    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int]:
        return kernel_pages

    ours = {
        "customize_spec": classmethod(customize_spec),
        "get_supported_kernel_block_sizes": staticmethod(get_supported_kernel_block_sizes),
        "__module__": backend.__module__,
        "__qualname__": backend.__qualname__,
    }
    return type(backend.__name__, (backend,), ours)


def reclaiming_spec(spec: AttentionSpec, vllm_config: VllmConfig) -> AttentionSpec:
    """The spec of a layer that runs the pattern: ours instead of full attention."""
    if type(spec) is not FullAttentionSpec:
        return spec
    asked = options.of_config(vllm_config)
    return PowerAttentionSpec(
        **{field.name: getattr(spec, field.name) for field in fields(AttentionSpec)},
        pattern=asked.effective_pattern,
        max_model_len=vllm_config.model_config.max_model_len,
        max_in_flight_tokens=vllm_config.max_in_flight_tokens,
        lookahead_tokens=vllm_config.num_speculative_tokens + vllm_config.num_lookahead_tokens,
        dense_tail=asked.dense_tail,
        dense_requests=asked.dense_requests,
    )
