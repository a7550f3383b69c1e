"""The KV cache spec of layers that run the pattern: vLLM sizes the pool, groups layers and picks the manager by it.

A page may be smaller or larger than a block, and need not divide it: vLLM enlarges the pages of hybrid models to the
size of a Mamba state, and the kernels then see each page as several of their own.

Written against vllm/v1/kv_cache_interface.py.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.request import Request

from vllm_power.dense_requests import is_dense
from vllm_power.lifetimes import Lifetimes, lifetimes
from vllm_power.pattern import Pattern


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
        return 1 + -(-(block_size - math.gcd(block_size, self.block_size)) // self.block_size)

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
        return lifetimes(self.pattern, self._last_query(num_tokens) // self.pattern.block_size)

    def needed_until(self, every_row: bool) -> Sequence[int]:
        """For each page of max_model_len tokens: a prefix hit of fewer pages than this needs it.

        every_row: all rows see everything.
        """
        return self._needed_until(every_row, self.max_model_len - 1)

    def needed_by(self, request: Request) -> Sequence[int]:
        """As :meth:`needed_until`, for this request and each of its pages with queries."""
        every_row = self.dense_requests and is_dense(request.sampling_params)
        return self._needed_until(every_row, self._last_query(most_tokens(request, self.max_model_len)))

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

    def _last_query(self, num_tokens: int) -> int:
        """The last query of a request that never exceeds ``num_tokens`` tokens."""
        # The last sampled token never becomes a query.
        return min(max(num_tokens - 2, 0) + self.lookahead_tokens, self.max_model_len - 1)

    def _needed_until(self, every_row: bool, last_query: int) -> Sequence[int]:
        last_block = last_query // self.pattern.block_size
        num_pages = -(-min((last_block + 1) * self.pattern.block_size, self.max_model_len) // self.block_size)
        # The prompt's tail, or every row, reads all of it.
        reads_all = bool(self.dense_tail) or every_row
        return _needed_until(self.pattern, last_block, num_pages, self.block_size, reads_all)


def most_tokens(request: Request, max_model_len: int) -> int:
    """The most tokens that a request may ever have."""
    if getattr(request, "resumable", False):  # it may get more prompt later
        return max_model_len
    return min(max_model_len, request.num_prompt_tokens + request.max_tokens)


def _blocks_of(page: int, page_size: int, block_size: int) -> range:
    return range(page * page_size // block_size, -(-(page + 1) * page_size // block_size))


@lru_cache(maxsize=64)  # two per engine of the process, and a few for the lengths of its requests
def _needed_until(
    pattern: Pattern, last: int, num_pages: int, page_size: int, reads_all: bool
) -> Sequence[int]:
    """:meth:`PowerAttentionSpec.needed_until` up to the query block ``last``, [num_pages], int32."""
    block_size = pattern.block_size

    def pages_until(reader: int) -> int:
        return -(-(reader + 1) * block_size // page_size)

    if reads_all:
        return array("i", [pages_until(last)]) * num_pages
    of_blocks = lifetimes(pattern, last).last_reader
    touched = (_blocks_of(page, page_size, block_size) for page in range(num_pages))
    return array("i", (pages_until(max(of_blocks[blocks.start : blocks.stop])) for blocks in touched))
