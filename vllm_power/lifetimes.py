"""When a KV block is read for the last time: the pattern is static, so this is known before the first token.

A request's queries end at a last block. Block b is dead once the queries have passed ``Pattern.last_reader(b)``: not in
the window, not the sink, and no distance that is a power of two lands in what is left.
"""

from dataclasses import dataclass
from functools import lru_cache

from vllm_power.pattern import Pattern


@dataclass(frozen=True)
class Lifetimes:
    """The lives of the blocks of a request whose last query lies in block ``last``.

    last_reader[b]: the last query block that reads block b.
    dying_after[q]: the blocks that are dead once all queries of block q are through.
    live[q]: how many of the blocks 0..q some query from block q on reads.
    peak_from[q]: the largest of live[q], live[q + 1], ...
    """

    last: int
    last_reader: tuple[int, ...]
    dying_after: tuple[tuple[int, ...], ...]
    live: tuple[int, ...]
    peak_from: tuple[int, ...]


@lru_cache(maxsize=256)
def lifetimes(pattern: Pattern, last: int) -> Lifetimes:
    """The lives of the blocks 0..``last`` under ``pattern``. Cached: many requests end in the same block."""
    last_reader = tuple(pattern.last_reader(block, last) for block in range(last + 1))
    dying_after: list[list[int]] = [[] for _ in range(last + 1)]
    for block, reader in enumerate(last_reader):
        dying_after[reader].append(block)
    live, count = [], 0
    for q in range(last + 1):
        count += 1  # block q itself
        live.append(count)
        count -= len(dying_after[q])
    peak_from, peak = [], 0
    for count in reversed(live):
        peak = max(peak, count)
        peak_from.append(peak)
    return Lifetimes(
        last, last_reader, tuple(map(tuple, dying_after)), tuple(live), tuple(reversed(peak_from))
    )
