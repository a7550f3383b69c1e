"""The order in which vLLM's pool gives up cached pages: the same with and without reclamation.

Without reclamation, a request holds all its pages until it ends. Then they join the queue of free pages, the tail
first, so that a prefix survives longest. A page that is returned early must not join the queue early, or it would be
reused first, and the hole would end the prefix hit of the next turn. Therefore a request keeps a claim on each page
that it returned. Claimed pages are free, but they are reused only after all unclaimed ones, the deepest first. When the
request ends, its claims end, and the pages join the queue in the place that they would have had.

Written against FreeKVCacheBlockQueue in vllm/v1/core/kv_cache_utils.py and vllm/v1/core/block_pool.py.
"""

import heapq
from collections import defaultdict
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class Claim(NamedTuple):
    """One request's claim on a page. It is void if the page was reused since, which ``generation`` shows."""

    page: KVCacheBlock
    generation: int


class EvictionOrder(FreeKVCacheBlockQueue):
    """vLLM's queue of free pages, followed by the free pages that are claimed.

    claimed: {page: [number of claims, depth]}, including pages that another request holds. parked: the claimed pages
    that are free. The depth is the page's number in its sequence.
    """

    def __init__(self, free: FreeKVCacheBlockQueue) -> None:
        """Take over the pages of ``free``, which must not be used any more."""
        self.claimed: dict[int, list[int]] = {}
        self.parked: dict[int, KVCacheBlock] = {}
        self._deepest: list[tuple[int, int]] = []  # a heap of (-depth, page); also has pages no longer parked
        self._generation: defaultdict[int, int] = defaultdict(int)
        super().__init__(free.get_all_free_blocks())

    # --- claims -------------------------------------------------------------------------------------------------

    def claim(self, page: KVCacheBlock, depth: int) -> Claim:
        """Claim a page that has a hash, free or held."""
        number = page.block_id
        self.claimed.setdefault(number, [0, depth])[0] += 1
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
        self.claimed[number][0] -= 1
        if not self.claimed[number][0]:
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
        pages += [self._deepest_parked() for _ in range(n - unclaimed)]
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
        parked = sorted(self.parked, key=lambda number: -self.claimed[number][1])
        return super().get_all_free_blocks() + [self.parked[number] for number in parked]

    # --- claimed pages that are free ----------------------------------------------------------------------------

    def _park(self, page: KVCacheBlock) -> None:
        number = page.block_id
        self.parked[number] = page
        heapq.heappush(self._deepest, (-self.claimed[number][1], number))
        if len(self._deepest) > 2 * len(self.parked) + 64:
            self._deepest = [(-self.claimed[number][1], number) for number in self.parked]
            heapq.heapify(self._deepest)

    def _deepest_parked(self) -> KVCacheBlock:
        while True:
            depth, number = heapq.heappop(self._deepest)
            if number in self.parked and self.claimed[number][1] == -depth:
                return self.parked.pop(number)
