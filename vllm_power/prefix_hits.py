"""The longest cached prefix of which some pages may be missing: those that no later query can see."""

from collections.abc import Callable, Sequence
from typing import TypeVar

Page = TypeVar("Page")


def longest_hits(
    lookup: Callable[[int], Page | None],
    num_pages: int,
    needed_until: Sequence[int],
    pages_per_hit: int = 1,
) -> tuple[list[Page | None], int, int]:
    """The cached pages from the first on, the longest hit and the hit before it, both in pages.

    lookup: the cached page with this number, or None. num_pages: the most pages of a hit. needed_until: [pages], a hit
    of fewer pages than this needs the page, because queries after it read it. pages_per_hit: hits are multiples of it.

    A missing page rules out the hits that end after it while later queries still read it, but not longer ones. Usually
    all pages after the hit are missing. Then each lookup of the last page before the shortest hit that is still
    possible rules out as many pages as lie between a page and its last reader.
    """
    cached: list[Page | None] = []
    longest = before = 0
    ruled_out = 0  # hits of fewer pages than this are ruled out by a missing page
    for number in range(num_pages):
        page = lookup(number)
        cached.append(page)
        if page is None and needed_until[number] > ruled_out:
            ruled_out = needed_until[number]
            while (
                ruled_out <= num_pages
                and (further := needed_until[ruled_out - 1]) > ruled_out
                and lookup(ruled_out - 1) is None
            ):
                ruled_out = further
            if ruled_out > num_pages:
                break
        if number + 1 >= ruled_out and (number + 1) % pages_per_hit == 0:
            longest, before = number + 1, longest
    return cached, longest, before
