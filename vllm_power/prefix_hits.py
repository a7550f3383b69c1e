"""The longest cached prefix of which some pages may be missing: those that no later query can see."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Page = TypeVar("Page")


def longest_hits(
    lookup: Callable[[int], Page | None],
    num_pages: int,
    last_reader: Sequence[int],
    pages_per_block: int,
    pages_per_hit: int = 1,
) -> tuple[list[Page | None], int, int]:
    """The cached pages from the first on, the longest hit and the hit before it, both in pages.

    lookup: the cached page with this number, or None. num_pages: the most pages of a hit. last_reader: [blocks], the
    last query block that reads a block. pages_per_hit: hits are multiples of it.

    A missing page of block b rules out the hits that end after it while later queries still read b, but not longer
    ones. Usually all pages after the hit are missing. Then each lookup of the last page before the shortest hit that
    is still possible rules out as many blocks as lie between a block and its last reader.
    """

    def end_of_need(page: int) -> int:
        return (last_reader[page // pages_per_block] + 1) * pages_per_block

    cached: list[Page | None] = []
    longest = before = 0
    ruled_out = 0  # hits of fewer pages than this are ruled out by a missing page
    for number in range(num_pages):
        page = lookup(number)
        cached.append(page)
        if page is None and end_of_need(number) > ruled_out:
            ruled_out = end_of_need(number)
            while (
                ruled_out <= num_pages
                and (further := end_of_need(ruled_out - 1)) > ruled_out
                and lookup(ruled_out - 1) is None
            ):
                ruled_out = further
            if ruled_out > num_pages:
                break
        if number + 1 >= ruled_out and (number + 1) % pages_per_hit == 0:
            longest, before = number + 1, longest
    return cached, longest, before
