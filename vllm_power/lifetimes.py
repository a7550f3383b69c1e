"""When a KV block is read for the last time. The pattern is static, so this is known before the first token.

The last block of a request's queries is known. Block b is dead when the queries have passed ``Pattern.last_reader(b)``:
it is then outside the window, it is not a sink, and no remaining query is at a distance that is a power of two.

Nothing here is listed per block. The age of a block, counted back from the last block, decides how long it is read.
Ages of one kind form runs (14 runs for a million tokens under the default pattern), and counts over blocks are
piecewise linear. LongNet's blocks are read only inside their segments.
"""

import threading
from array import array
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from vllm_power.pattern import LONGNET_SEGMENT, Pattern, preset


class _Blocks(Protocol):
    """The lifetimes of the blocks of one request; ``size`` is the number of integers stored for them."""

    size: int

    def dying_after(self, q: int) -> tuple[int, ...]: ...

    def live(self, q: int) -> int: ...

    def peak_from(self, q: int) -> int: ...


class _PerBlock(Sequence[Any]):
    """A sequence whose items are computed on access."""

    def __init__(self, length: int, item: Callable[[int], Any]) -> None:
        self._positions, self._item = range(length), item

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        wanted = self._positions[index]
        return self._item(wanted) if isinstance(wanted, int) else tuple(map(self._item, wanted))


class Lifetimes:
    """The lives of the blocks of a request whose last query lies in block ``last``.

    last_reader[b]: the last query block that reads block b.
    dying_after[q]: the blocks that are dead after all queries of block q, ascending.
    live[q]: how many of the blocks 0..q are read by some query in block q or later.
    peak_from[q]: the largest of live[q], live[q + 1], ...
    """

    def __init__(self, pattern: Pattern, last: int) -> None:
        self.pattern, self.last = pattern, last
        blocks: _Blocks = (_Segments if pattern.name == "longnet" else _Ages)(pattern, last)
        self.size = blocks.size
        self.dying_after: Sequence[tuple[int, ...]] = _PerBlock(last + 1, blocks.dying_after)
        self.live: Sequence[int] = _PerBlock(last + 1, blocks.live)
        self.peak_from: Sequence[int] = _PerBlock(last + 1, blocks.peak_from)

    @cached_property
    def last_reader(self) -> Sequence[int]:
        """Computed on first access: only prefix hits need it, for the longest request."""
        return array("i", (self.pattern.last_reader(block, self.last) for block in range(self.last + 1)))


class _Run(NamedTuple):
    """The ages ``first`` to ``end``. All die at the query age ``death``; if None, ``read`` blocks later."""

    first: int
    end: int
    death: int | None = None
    read: int = 0


class _Ages:
    """Patterns that depend only on the distance. An age is ``last`` minus a block; it falls as the queries advance."""

    def __init__(self, pattern: Pattern, last: int) -> None:
        self.last = last
        oldest = last - pattern.sink_blocks  # of the blocks that are not sinks
        self.runs = [run._replace(end=min(run.end, oldest)) for run in _runs(pattern, oldest)]
        if pattern.sink_blocks:
            self.runs.append(_Run(max(0, oldest + 1), last, death=0))
        self.longest = max((run.end - run.read for run in self.runs if run.death is None), default=-1)
        self._count()
        self.size = 4 * len(self.points) + 4 * len(self.runs)

    def dying_after(self, q: int) -> tuple[int, ...]:
        age = self.last - q
        found: list[int] = []
        for run in self.runs:
            if run.death is None:
                if age <= self.longest and run.first <= age + run.read <= run.end:
                    found.append(q - run.read)
            elif run.death == age:
                found += range(self.last - run.end, self.last - run.first + 1)
        return tuple(sorted(found))

    def live(self, q: int) -> int:
        return self._live_at(self.last - q)

    def peak_from(self, q: int) -> int:
        age = self.last - q
        return max(self.peaks[bisect_right(self.points, age) - 1], self._live_at(age))

    def _live_at(self, age: int) -> int:
        at = bisect_right(self.points, age) - 1
        return self.values[at] + self.slopes[at] * (age - self.points[at])

    def _count(self) -> None:
        """The number of live blocks by the query's age: its value and slope from each point on, and the peak so far.

        The live blocks of a run are those that are no younger than the query and not yet dead.
        """
        slopes: dict[int, int] = defaultdict(int, {0: 0})
        jumps: dict[int, int] = defaultdict(int)
        for first, end, death, read in self.runs:
            if death is None:
                slopes[first - read - 1] += 1
                slopes[end - read] -= 1
            else:
                jumps[death] += end - first + 1
                slopes[death - 1] += 0  # the value right before the jump may be a peak
                slopes[death] += 0
            slopes[first] -= 1
            slopes[end + 1] += 1
        points = sorted(slopes)
        slope = value = before = 0
        self.points, self.values, self.slopes = array("q"), array("q"), array("q")
        for point in points:
            value += slope * (point - before) + jumps[point]
            slope, before = slope + slopes[point], point
            self.points.append(point)
            self.values.append(value)
            self.slopes.append(slope)
        self.peaks = array("q", accumulate(self.values, max))


def _runs(pattern: Pattern, oldest: int) -> Iterator[_Run]:
    """The runs of at least the ages 0 to ``oldest``; the last run may extend further."""
    if oldest < 0:
        return
    window, stride = pattern.window_blocks, pattern.stride
    if pattern.name == "full" or (pattern.name == "stride_slash" and stride == 1):
        yield _Run(0, oldest, death=0)
        return
    if pattern.name == "dilated":  # every second distance
        yield from (_Run(age, age, death=age % 2) for age in range(min(window, oldest + 1)))
        read = window - 1 - (window - 1) % 2
    else:
        yield _Run(0, min(window - 1, oldest), death=0)
        read = window - 1
    first = window
    while first <= oldest:
        match pattern.name:
            case "power":
                distance = 1 << first.bit_length() - 1
                end = 2 * distance - 1
            case "stride_slash":
                distance = first - first % stride
                end = distance + stride - 1
            case _:
                distance, end = 0, oldest
        yield _Run(first, end, read=max(read, distance))
        first = end + 1


class _Segments:
    """LongNet. Its longest segments share no blocks."""

    def __init__(self, pattern: Pattern, last: int) -> None:
        self.last, self.sinks = last, pattern.sink_blocks
        # after[s]: the maximum number of live blocks in segment s and later segments.
        segments = range(last // LONGNET_SEGMENT + 1)
        most = (self._most_in(segment) for segment in reversed(segments))
        self.after = array("q", reversed(list(accumulate(most, max))))
        self.size = len(self.after)

    def dying_after(self, q: int) -> tuple[int, ...]:
        segment, offset = divmod(q, LONGNET_SEGMENT)
        dead = _segment(*self._extent(segment))[0][offset]
        sinks = range(min(self.sinks, q + 1)) if q == self.last else range(0)
        return (*sinks, *(segment * LONGNET_SEGMENT + block for block in dead))

    def live(self, q: int) -> int:
        segment, offset = divmod(q, LONGNET_SEGMENT)
        return min(self.sinks, q + 1) + _segment(*self._extent(segment))[1][offset]

    def peak_from(self, q: int) -> int:
        segment, offset = divmod(q, LONGNET_SEGMENT)
        later = self.after[segment + 1] if segment + 1 < len(self.after) else 0
        return max(later, *self._live_in(segment)[offset:])

    def _extent(self, segment: int) -> tuple[int, int]:
        """The offsets of the first block of a segment that is not a sink, and of its last block."""
        start = segment * LONGNET_SEGMENT
        first = min(max(0, self.sinks - start), LONGNET_SEGMENT)
        return first, min(LONGNET_SEGMENT, self.last - start + 1) - 1

    def _most_in(self, segment: int) -> int:
        first, end = self._extent(segment)
        return max(self._live_in(segment)) if first else self.sinks + _most(end)

    def _live_in(self, segment: int) -> list[int]:
        start = segment * LONGNET_SEGMENT
        counts = _segment(*self._extent(segment))[1]
        return [min(self.sinks, start + offset + 1) + count for offset, count in enumerate(counts)]


@cache
def _segment(first: int, end: int) -> tuple[list[list[int]], list[int]]:
    """For the blocks ``first`` to ``end`` of a segment: which die after each of its blocks, and how many live then."""
    without_sinks = preset("longnet")
    dying: list[list[int]] = [[] for _ in range(end + 1)]
    for block in range(first, end + 1):
        dying[without_sinks.last_reader(block, end)].append(block)
    live, count = [], 0
    for q in range(end + 1):
        count += q >= first
        live.append(count)
        count -= len(dying[q])
    return dying, live


@cache
def _most(end: int) -> int:
    """The maximum number of live blocks of a segment without sinks that ends with its block ``end``."""
    return max(_segment(0, end)[1])


# Integers kept for all requests together: 32 MiB.
MOST_NUMBERS = 4 << 20
_kept: "OrderedDict[tuple[Pattern, int], Lifetimes]" = OrderedDict()
_lock = threading.Lock()  # the web page calls from several threads


def lifetimes(pattern: Pattern, last: int) -> Lifetimes:
    """The lives of the blocks 0..``last`` under ``pattern``. Cached: many requests end in the same block."""
    key = (pattern, last)
    with _lock:
        if found := _kept.get(key):
            _kept.move_to_end(key)
            return found
    made = Lifetimes(pattern, last)
    with _lock:
        _kept[key] = made
        while len(_kept) > 256 or (
            sum(lives.size for lives in _kept.values()) > MOST_NUMBERS and len(_kept) > 1
        ):
            _kept.popitem(last=False)
    return made
