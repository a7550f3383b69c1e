"""Exact reclamation: a page is returned to vLLM's pool when no later query of its request can see a block in it.

A page may be smaller or larger than a block, and need not divide it: vLLM enlarges the pages of hybrid models to the
size of a Mamba state, and the kernels then see each page as several of their own (``kernel_pages``).

vLLM asks the backend for a layer's KV cache spec and looks up the manager of that spec in its registry. Our spec is a
separate kind, neither full attention (prefix hits have holes) nor a sliding window (the holes are in the middle). The
last query of a request is known: prompt plus max_tokens, at most max_model_len. Freed blocks keep their hash until vLLM
reuses them, so later prompts may still find them.

Written against vllm/v1/core/single_type_kv_cache_manager.py and vllm/v1/kv_cache_spec_registry.py.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import chain
from math import gcd
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from vllm_power import options
from vllm_power.dense_requests import is_dense
from vllm_power.lifetimes import Lifetimes, lifetimes
from vllm_power.pattern import ENDLESS, Pattern
from vllm_power.prefix_hashes import are_dense_request


@dataclass(frozen=True, kw_only=True)
class PowerAttentionSpec(AttentionSpec):
    """The KV cache of a layer that runs ``pattern``. ``block_size`` is vLLM's name for the tokens per page.

    max_model_len: the longest sequence. max_in_flight_tokens: the most tokens of steps that are not settled yet.
    lookahead_tokens: how far past the last token speculative decoding may query.
    dense_tail: how many last tokens of a prompt see everything. If not 0, blocks live until the prompt ends.
    dense_requests: whether requests may ask that all their rows see everything. Then all their blocks live on.
    """

    pattern: Pattern
    max_model_len: int
    max_in_flight_tokens: int
    lookahead_tokens: int
    dense_tail: int = 0
    dense_requests: bool = False

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Peak bytes of one request of max_model_len tokens. vLLM sizes the cache and reports concurrency by it."""
        longest = vllm_config.model_config.max_model_len
        pages = -(-longest // self.block_size) if self.dense_requests else self.peak_pages(0, longest)
        return pages * self.page_size_bytes

    @property
    def most_pages_per_block(self) -> int:
        """The most pages that one block touches."""
        block_size = self.pattern.block_size
        return 1 + -(-(block_size - gcd(block_size, self.block_size)) // self.block_size)

    def pages_of(self, block: int) -> range:
        """The pages that hold tokens of ``block``."""
        block_size = self.pattern.block_size
        return range(block * block_size // self.block_size, -(-(block + 1) * block_size // self.block_size))

    def blocks_of(self, page: int) -> range:
        """The blocks of which ``page`` holds tokens."""
        return _blocks_of(page, self.block_size, self.pattern.block_size)

    def last_reader(self, page: int, last: int) -> int:
        """The last query block up to ``last`` that reads ``page``, which holds no block after ``last`` alone."""
        blocks = self.blocks_of(page)
        return max(
            self.pattern.last_reader(block, last) for block in range(blocks.start, min(blocks.stop, last + 1))
        )

    def lifetimes(self, num_tokens: int) -> Lifetimes:
        """The lives of the blocks of a request that never exceeds ``num_tokens`` tokens."""
        # The last sampled token never becomes a query.
        last_query = min(max(num_tokens - 2, 0) + self.lookahead_tokens, self.max_model_len - 1)
        return lifetimes(self.pattern, last_query // self.pattern.block_size)

    def peak_pages(self, query_block: int, num_tokens: int) -> int:
        """The most pages that a request of up to ``num_tokens`` tokens holds from ``query_block`` on.

        Blocks are freed when their steps are settled, so blocks in flight are added to the live ones.
        """
        if self.dense_tail:
            return -(-num_tokens // self.block_size)
        lives = self.lifetimes(num_tokens)
        in_flight = 1 + -(-self.max_in_flight_tokens // self.pattern.block_size)
        peak = (lives.peak_from[min(query_block, lives.last)] + in_flight) * self.most_pages_per_block
        return min(peak, -(-num_tokens // self.block_size))


@dataclass(slots=True)
class _Request:
    """What the manager records about a request that holds pages. Most steps reach neither of the last two marks.

    num_tokens: the maximum number of its tokens. kept_until: blocks live at least until this many tokens are settled.
    num_null: null pages in its table. query_block: all queries before this block are settled. next_release: the number
    of settled tokens at which the next block is settled. next_full_page: the number of tokens at which the next page
    is full and can be found by its hash.
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
        self.known_requests: Mapping[str, Request] = {}  # those of the scheduler, by their ids
        self.num_reclaimed = 0  # pages returned early, of all requests so far

    # --- what vLLM calls ----------------------------------------------------------------------------------------

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the pages that no query from ``processed_computed_tokens`` on sees. Called before every allocation."""
        known = self.requests.get(request_id)
        if known is None:
            # vLLM passes the Request, which knows max_tokens, to a manager only through cache_blocks, at the end of an
            # allocation, and calls that only if this flag is set. Without prefix caching nothing else reads the flag.
            self.enable_caching = True
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
        if self.prefix_caching and num_tokens >= known.next_full_page:
            super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)
            known.next_full_page = (num_tokens // self.block_size + 1) * self.block_size

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
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            False,
            prefill_end,
        )
        if not apply_admission_cap or self._keeps_all(request_id):
            return needed
        known = self.requests.get(request_id) or _Request(self.kv_cache_spec.max_model_len)
        peak = self.kv_cache_spec.peak_pages(known.query_block, known.num_tokens)
        held = len(self.req_to_blocks.get(request_id, ())) - known.num_null
        return min(needed, max(peak - held, 0))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.requests.pop(request_id, None)
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

        A missing page rules out the hits that end after it while later queries still read it, but not longer hits.
        Pages that no query after the hit sees are null in the result.
        """
        spec = kv_cache_spec
        page_size, block_size = spec.block_size, spec.pattern.block_size
        block_hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            page_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        # The prompt's tail, or every row of a dense request, reads all of it.
        reads_all = bool(spec.dense_tail) or are_dense_request(block_hashes)
        last_reader = _last_readers(spec.pattern, spec.max_model_len, page_size, reads_all)
        num_pages = min(max_length // page_size, len(block_hashes))
        cached: list[Sequence[KVCacheBlock] | None] = []
        hits = [0, 0]  # in pages: the longest so far and the one before it
        ruled_out = 0  # hits of fewer pages than this are ruled out by a missing page
        for length in range(1, num_pages + 1):
            pages = block_pool.get_cached_block(block_hashes[length - 1], kv_cache_group_ids)
            cached.append(pages)
            if pages is None:
                ruled_out = max(ruled_out, -(-(last_reader[length - 1] + 1) * block_size // page_size))
                if ruled_out > num_pages:
                    break
            if length >= ruled_out and length * page_size % alignment_tokens == 0:
                hits = [length, hits[0]]
        hit = hits[1] if drop_eagle_block else hits[0]
        query_block = hit * page_size // block_size
        needed = [
            pages if reader >= query_block else None
            for pages, reader in zip(cached[:hit], last_reader, strict=False)
        ]
        return tuple(
            [pages[group] if pages else block_pool.null_block for pages in needed]
            for group in range(len(kv_cache_group_ids))
        ), hit * page_size

    # --- helpers ------------------------------------------------------------------------------------------------

    def _keeps_all(self, request_id: str) -> bool:
        """Whether the request asked that all its rows see everything, so that none of its blocks dies."""
        request = self.known_requests.get(request_id) if self.kv_cache_spec.dense_requests else None
        return request is not None and is_dense(request.sampling_params)

    def _meet(self, request: Request) -> _Request:
        """Record the maximum length of a request at its first allocation. Pages that its prefix hit skips are null."""
        limit = kept_until = self.kv_cache_spec.max_model_len
        if not getattr(request, "resumable", False):  # a resumable request may get more prompt later
            limit = min(limit, request.num_prompt_tokens + request.max_tokens)
            kept_until = request.num_prompt_tokens
        if not self.kv_cache_spec.dense_tail:
            kept_until = 0
        if self._keeps_all(request.request_id):
            kept_until = ENDLESS
        num_null = sum(page.is_null for page in self.req_to_blocks[request.request_id])
        self.requests[request.request_id] = met = _Request(limit, kept_until, num_null)
        self.num_cached_block.setdefault(
            request.request_id, 0
        )  # lets vLLM take its shorter path for running requests
        self.enable_caching = self.prefix_caching
        return met

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
                    freed.append(pages[page])
                    pages[page] = self._null_block
        self.block_pool.free_blocks(freed)
        request.query_block = query_block
        request.next_release = (query_block + 1) * block_size
        request.num_null += len(freed)
        self.num_reclaimed += len(freed)


def _blocks_of(page: int, page_size: int, block_size: int) -> range:
    return range(page * page_size // block_size, -(-(page + 1) * page_size // block_size))


@lru_cache(maxsize=8)  # two per engine of the process
def _last_readers(pattern: Pattern, max_model_len: int, page_size: int, reads_all: bool) -> Sequence[int]:
    """The last query block that reads each page of a request of ``max_model_len`` tokens."""
    last, num_pages = (max_model_len - 1) // pattern.block_size, -(-max_model_len // page_size)
    if reads_all:
        return array("i", [last]) * num_pages
    of_blocks = lifetimes(pattern, last).last_reader
    return array(
        "i",
        (
            max(of_blocks[blocks.start : blocks.stop])
            for blocks in (_blocks_of(page, page_size, pattern.block_size) for page in range(num_pages))
        ),
    )


KVCacheSpecRegistry._ensure_registered()  # otherwise the registry would never get vLLM's own specs
KVCacheSpecRegistry.register(
    PowerAttentionSpec, PowerAttentionManager, uniform_type_base_spec=PowerAttentionSpec
)


# vLLM calls a backend's customize_spec without the configuration, in the process that has built the layers. These are
# the fields of our spec in addition to vLLM's; None if reclamation is off.
_settings: dict[str, Any] | None = None
# The pattern's block of the same layers; None before any was built.
_block_size: int | None = None


def configure(vllm_config: VllmConfig) -> None:
    """Set what :func:`customize_spec` and :func:`kernel_pages` return. Called when a layer is built."""
    global _settings, _block_size
    if vllm_config.model_config.runner_type == "draft":
        return  # the settings of the target model apply to its draft model
    _settings, _block_size = None, options.of_config(vllm_config).effective_pattern.block_size
    if why_not(vllm_config) is None:
        asked = options.of_config(vllm_config)
        _settings = {
            "pattern": asked.effective_pattern,
            "max_model_len": vllm_config.model_config.max_model_len,
            "max_in_flight_tokens": vllm_config.max_in_flight_tokens,
            "lookahead_tokens": vllm_config.num_speculative_tokens + vllm_config.num_lookahead_tokens,
            "dense_tail": asked.dense_tail,
            "dense_requests": asked.dense_requests,
        }


# The model whose layers must keep all blocks, and why.
_kept: tuple[Any, str] | None = None


def keep_everything(vllm_config: VllmConfig, reason: str) -> None:
    """Disable reclamation for ``reason``. Called when the layers are built, before vLLM asks for their specs."""
    global _settings, _kept
    _settings, _kept = None, (vllm_config.model_config, reason)


def why_not(vllm_config: VllmConfig) -> str | None:
    """Why this configuration does not return blocks early; None if it does."""
    asked = options.of_config(vllm_config)
    if _kept is not None and _kept[0] is vllm_config.model_config:
        return _kept[1]
    if not asked.reclaim:
        return "the option reclaim is false"
    if vllm_config.kv_transfer_config is not None:
        return "a KV connector transfers whole sequences"
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        return "--disable-hybrid-kv-cache-manager leaves only full attention"
    if asked.effective_pattern.name == "full":
        return "the pattern full reads every block to the end"
    if asked.rows.dense_decode:
        return 'generated tokens see every block (decode is "dense")'
    return None


def customize_spec(spec: AttentionSpec) -> AttentionSpec:
    """The spec of a layer that runs the pattern: ours instead of full attention if reclamation is on."""
    if _settings is None or type(spec) is not FullAttentionSpec:
        return spec
    shared = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
    return PowerAttentionSpec(**shared, **_settings)


def kernel_pages(supported: Sequence[int], spec: object = None) -> list[int]:
    """The pages of ``supported`` that divide the pattern's block. vLLM splits its own pages into the largest that fits.

    spec: the layer's KV cache spec, if vLLM passes one.
    """
    block_size = spec.pattern.block_size if isinstance(spec, PowerAttentionSpec) else _block_size
    return [size for size in supported if block_size is None or block_size % size == 0]
