"""The order in which vLLM's pool gives up cached pages: the same with and without reclamation.

Without reclamation, a request holds all its pages until it ends. Then they join the queue of free pages, the tail
first, so that a prefix survives longest. A page that is returned early must not join the queue early, or it would be
reused first, and the hole would end the prefix hit of the next turn. Therefore a request keeps a claim on each page
that it returned. Claimed pages are free, but they are reused only after all unclaimed ones. When the request ends, its
claims end, and the pages join the queue in the place that they would have had.

Claimed pages are reused only when more requests run than would fit without reclamation. Then the request that started
last loses its pages first, the deepest first, as it would not run: so the others keep theirs.

Written against FreeKVCacheBlockQueue in vllm/v1/core/kv_cache_utils.py and vllm/v1/core/block_pool.py.
"""

import heapq
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class Claim(NamedTuple):
    """One request's claim on a page. It is void if the page was reused since, which ``generation`` shows."""

    page: KVCacheBlock
    generation: int


@dataclass(slots=True)
class _Claims:
    start: int
    depth: int
    count: int = 0


class EvictionOrder(FreeKVCacheBlockQueue):
    """vLLM's queue of free pages, followed by the free pages that are claimed.

    claimed: {page: its claims}, including pages that another request holds. parked: the claimed
    pages that are free. The start is the place of the first claiming request in the order in which the requests
    started, the depth is the page's number in its sequence.
    """

    def __init__(self, free: FreeKVCacheBlockQueue) -> None:
        """Take over the pages of ``free``, which must not be used any more."""
        self.claimed: dict[int, _Claims] = {}
        self.parked: dict[int, KVCacheBlock] = {}
        self._last: list[
            tuple[int, int, int]
        ] = []  # a heap of (-start, -depth, page); also pages no longer parked
        self._generation: defaultdict[int, int] = defaultdict(int)
        super().__init__(free.get_all_free_blocks())

    # --- claims -------------------------------------------------------------------------------------------------

    def claim(self, page: KVCacheBlock, start: int, depth: int) -> Claim:
        """Claim a page that has a hash, free or held."""
        number = page.block_id
        self.claimed.setdefault(number, _Claims(start, depth)).count += 1
        if page.ref_cnt == 0 and number not in self.parked:
            super().remove(page)
            self._park(page)
        return Claim(page, self._generation[number])

    def hold_again(self, claim: Claim) -> KVCacheBlock | None:
        """End a claim. The page counts as held once more, as if it had not been returned. None if the claim is void."""
        page, number = claim.page, claim.page.block_id
        if self._generation[number] != claim.generation:
            return None
        if page.ref_cnt == 0:
            self.remove(page)
        page.ref_cnt += 1
        self.claimed[number].count -= 1
        if not self.claimed[number].count:
            del self.claimed[number]
        return page

    # --- what vLLM calls ----------------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        return self._num_unclaimed + len(self.parked)

    @num_free_blocks.setter
    def num_free_blocks(self, number: int) -> None:
        self._num_unclaimed = number - len(self.parked)

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        unclaimed = min(n, self._num_unclaimed)
        pages = super().popleft_n(unclaimed)
        pages += [self._last_parked() for _ in range(n - unclaimed)]
        for page in pages if self.claimed else ():
            if self.claimed.pop(page.block_id, None):
                self._generation[page.block_id] += 1
        return pages

    def remove(self, block: KVCacheBlock) -> None:
        if self.parked.pop(block.block_id, None) is None:
            super().remove(block)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        if self.claimed:
            for block in blocks:
                if block.block_id in self.claimed:
                    self._park(block)
            blocks = [block for block in blocks if block.block_id not in self.claimed]
        super().append_n(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        parked = sorted(self._key(number) for number in self.parked)
        return super().get_all_free_blocks() + [self.parked[number] for *_, number in parked]

    # --- claimed pages that are free ----------------------------------------------------------------------------

    def _key(self, number: int) -> tuple[int, int, int]:
        claims = self.claimed[number]
        return -claims.start, -claims.depth, number

    def _park(self, page: KVCacheBlock) -> None:
        self.parked[page.block_id] = page
        heapq.heappush(self._last, self._key(page.block_id))
        if len(self._last) > 2 * len(self.parked) + 64:
            self._last = [self._key(number) for number in self.parked]
            heapq.heapify(self._last)

    def _last_parked(self) -> KVCacheBlock:
        while True:
            key = heapq.heappop(self._last)
            number = key[-1]
            if number in self.parked and self._key(number) == key:
                return self.parked.pop(number)
