"""The order in which vLLM's pool gives up cached pages: the same with and without reclamation.

Without reclamation, a request holds all its pages until it ends. Then they join the queue of free pages, the tail
first, so that a prefix survives longest. A page that is returned early must not join the queue early, or it would be
reused first, and the hole would end the prefix hit of the next turn. Therefore a request keeps a claim on each page
that it returned. Claimed pages are free, but they are reused only after all unclaimed ones. When the request ends, its
claims end, and the pages join the queue in the place that they would have had.

Claimed pages are reused only when more requests run than would fit without reclamation. Then the page that was computed
last is reused first: a sequence loses its tail before its prefix, and the conversations that were there first keep
their pages, instead of each taking the other's in turn.

Written against FreeKVCacheBlockQueue in vllm/v1/core/kv_cache_utils.py and vllm/v1/core/block_pool.py.
"""

import heapq
from collections import defaultdict
from itertools import count
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock


class Claim(NamedTuple):
    """One request's claim on what a page held when its number was ``handed_out``; void if it was reused since."""

    page: KVCacheBlock
    handed_out: int


class EvictionOrder(FreeKVCacheBlockQueue):
    """vLLM's queue of free pages, followed by the free pages that are claimed. ``num_free_blocks`` counts both.

    claims: {page: number of claims}, including pages that another request holds. parked: the claimed pages that are
    free. handed_out: {page: when it was last handed out}, counted in pages.
    """

    def __init__(self, free: FreeKVCacheBlockQueue) -> None:
        """Take over the pages of ``free``, which must not be used any more."""
        self.claims: defaultdict[int, int] = defaultdict(int)
        self.parked: dict[int, KVCacheBlock] = {}
        self.handed_out: defaultdict[int, int] = defaultdict(int)
        self._last: list[
            tuple[int, int]
        ] = []  # a heap of (-handed_out, page); also has pages no longer parked
        self._numbers = count(1)
        super().__init__(free.get_all_free_blocks())

    # --- claims -------------------------------------------------------------------------------------------------

    def claim(self, page: KVCacheBlock) -> Claim:
        """Claim a page that has a hash, free or held."""
        number = page.block_id
        self.claims[number] += 1
        if page.ref_cnt == 0 and number not in self.parked:
            super().remove(page)
            self._park(page)
        return Claim(page, self.handed_out[number])

    def hold_again(self, claim: Claim) -> KVCacheBlock | None:
        """End a claim. The page counts as held once more, as if it had not been returned. None if the claim is void."""
        page, number = claim.page, claim.page.block_id
        if self.handed_out[number] != claim.handed_out:
            return None
        if page.ref_cnt == 0:
            self.remove(page)
        page.ref_cnt += 1
        self.claims[number] -= 1
        if not self.claims[number]:
            del self.claims[number]
        return page

    # --- what vLLM calls ----------------------------------------------------------------------------------------

    def popleft(self) -> KVCacheBlock:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[KVCacheBlock]:
        unclaimed = min(n, self.num_free_blocks - len(self.parked))
        pages = super().popleft_n(unclaimed)
        pages += [self._last_parked() for _ in range(n - unclaimed)]
        for page in pages:
            self.handed_out[page.block_id] = next(self._numbers)
            self.claims.pop(page.block_id, None)
        return pages

    def remove(self, block: KVCacheBlock) -> None:
        if block.block_id in self.parked:
            self._unpark(block.block_id)
        else:
            super().remove(block)

    def append(self, block: KVCacheBlock) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[KVCacheBlock]) -> None:
        if self.claims:
            for block in blocks:
                if block.block_id in self.claims:
                    self._park(block)
            blocks = [block for block in blocks if block.block_id not in self.claims]
        super().append_n(blocks)

    def get_all_free_blocks(self) -> list[KVCacheBlock]:
        parked = sorted(self.parked, key=self.handed_out.__getitem__, reverse=True)
        return super().get_all_free_blocks() + [self.parked[number] for number in parked]

    # --- claimed pages that are free ----------------------------------------------------------------------------

    def _park(self, page: KVCacheBlock) -> None:
        self.parked[page.block_id] = page
        self.num_free_blocks += 1
        heapq.heappush(self._last, (-self.handed_out[page.block_id], page.block_id))
        if len(self._last) > 2 * len(self.parked) + 64:
            self._last = [(-self.handed_out[number], number) for number in self.parked]
            heapq.heapify(self._last)

    def _unpark(self, number: int) -> KVCacheBlock:
        self.num_free_blocks -= 1
        return self.parked.pop(number)

    def _last_parked(self) -> KVCacheBlock:
        while True:
            handed_out, number = heapq.heappop(self._last)
            if number in self.parked and self.handed_out[number] == -handed_out:
                return self._unpark(number)
