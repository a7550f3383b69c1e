"""The pattern as lists for the training kernels: which key tiles each query tile reads, and which query tiles read it.

A **tile** is ``tile`` tokens of one text, counted from the text's first token. Texts can begin anywhere in a row: tiles
of different texts need not be aligned, and no token is moved. The lists of a pattern are the same for every text: a
shorter text uses the beginning of each list. So a text costs one record per tile; it needs its own lists only if some
of its tokens see everything.

Records are int32 [records, 12]:

| word | of a query tile | of a chunk of the readers of a key tile | of a sum of chunks |
| --- | --- | --- | --- |
| 0 | 0 nothing, 1 text, 2 padding | the same + 4 * (its part + 1); without a part it writes the gradients | 0 or 1 |
| 1 to 3 | row, first token of the text, its length | the same | the same |
| 4 | number of the tile in its text | the same | the same |
| 5, 6 | first and last (excluded) position that sees everything | the same | first part, parts |
| 7, 8 | first entry and number of the tiles read as a whole | of the query tiles that read it as a whole | |
| 9, 10 | the same for the tiles read in part | the same | |
| 11 | bits for the tile's own keys | the same; 0: not in this chunk | |

Entries are int32 [entries, 2]: the number of a tile, and bits for a tile read in part
(vllm_power.kernels.training_tiles).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_power.pattern import Pattern

WORDS = 12
NOTHING, TEXT, PADDING = range(3)

WIDEST_HEAD = 256

# The readers of a key tile are divided among programs if there are more than TIMES_MEAN times the mean, and more than
# MANY_READERS.
TIMES_MEAN = 4
MANY_READERS = 16


class Text(NamedTuple):
    """Tokens ``start`` to ``end`` (excluded) of a row. Positions dense_from to dense_to (excluded) see everything."""

    row: int
    start: int
    end: int
    dense_from: int = 0
    dense_to: int = 0


@dataclass(frozen=True)
class Lists:
    """What the kernels need in addition to queries, keys and values; see the module's docstring.

    tiles, chunks, sums: int32 [n, 12], entries: int32 [n, 2], each padded so that lengths vary little between batches.
    tile: tokens per tile; parts: blocks per tile, at least 1; partial: whether some tile is read in part.
    """

    tiles: torch.Tensor
    chunks: torch.Tensor
    sums: torch.Tensor
    entries: torch.Tensor
    tile: int
    parts: int
    partial: bool

    def to(self, device: Any, non_blocking: bool = False) -> "Lists":
        """The same lists on ``device``, as ordinary tensors even under ``torch.inference_mode``."""
        with torch.inference_mode(False):
            moved = self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        for tensor in moved.tensors:  # longer lists must not recompile a layer
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return moved

    def pin_memory(self) -> "Lists":
        """The same lists in pinned memory, from which a GPU copies asynchronously. PyTorch's data loaders call this."""
        return self._each(torch.Tensor.pin_memory)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.tiles, self.chunks, self.sums, self.entries

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Lists":
        tiles, chunks, sums, entries = map(change, self.tensors)
        return replace(self, tiles=tiles, chunks=chunks, sums=sums, entries=entries)


def tile_of(pattern: Pattern, head_size: int, dtype: torch.dtype) -> int:
    """Tokens per tile: as many as a Hopper GPU's registers and shared memory hold."""
    if dtype.itemsize > 2:
        return 32
    if head_size > 128:
        return 64
    return 128 if pattern.name == "full" or pattern.block_size >= 128 else 64


def lists(
    pattern: Pattern,
    texts: Sequence[Text],
    rows: int,
    num_keys: int,
    tile: int,
    num_queries: int | None = None,
) -> Lists:
    """The lists of ``texts``, in order, in ``rows`` rows of ``num_keys`` tokens; all other tokens are padding.

    num_queries: the number of query tokens, the last ones of each row; all by default. The tensors are on the CPU.
    """
    with torch.inference_mode(False):  # batches are cached, and training may reuse one made in an evaluation
        return _lists(
            pattern, tuple(texts), rows, num_keys, tile, num_keys if num_queries is None else num_queries
        )


@lru_cache(maxsize=64)
def _lists(
    pattern: Pattern, texts: tuple[Text, ...], rows: int, num_keys: int, tile: int, num_queries: int
) -> Lists:
    if pattern.name == "full":
        pattern = Pattern("full", max(tile, pattern.block_size), sink_blocks=0)
    shift = num_keys - num_queries
    table = _table(pattern, tile, _capacity(texts, tile))
    entries = [table.entries]
    tiles, chunks, sums = [], [], []
    num_parts, done = 0, sum(len(part) for part in entries)
    for text in texts:
        length = text.end - text.start
        count = -(-length // tile)
        own = table
        if text.dense_from < min(text.dense_to, length):
            own = _with_dense(pattern, tile, count, text.dense_from, min(text.dense_to, length), length)
            entries.append(own.entries)
        first = (
            count if text.end <= shift else max(0, shift - text.start) // tile
        )  # the first tile with queries
        words = (TEXT, text.row, text.start, length)
        base = 0 if own is table else done
        done += 0 if own is table else len(own.entries)
        tiles.append(own.query_records(words, first, count, text, base))
        found, summed, num_parts = own.key_records(words, first, count, text, base, num_parts)
        chunks.append(found)
        sums.append(summed)
    for row, start, end in _padding(texts, rows, num_keys):
        count = -(-(end - start) // tile)
        records = np.zeros((count, WORDS), np.int32)
        records[:, :4] = PADDING, row, start, end - start
        records[:, 4] = np.arange(count)
        tiles.append(records[max(0, shift - start) // tile :])
        chunks.append(records)
    sorted_tiles = _heavy_first(np.concatenate(tiles))
    bits = pattern.block_size < tile
    return Lists(
        _padded(sorted_tiles),
        _padded(np.concatenate(chunks)),
        _padded(np.concatenate([*sums, np.zeros((0, WORDS), np.int32)])),
        _padded(np.concatenate(entries)),
        tile,
        max(1, tile // pattern.block_size),
        bits or any(text.dense_from < text.dense_to for text in texts),
    )


class _Table(NamedTuple):
    """The lists of one text's tiles. whole, partial: bool [query tiles, key tiles] of earlier tiles. The records of
    :func:`lists` are made from the other fields."""

    whole: np.ndarray
    partial: np.ndarray
    own_bits: np.ndarray
    entries: np.ndarray
    offsets: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    def query_records(
        self, words: tuple[int, ...], first: int, count: int, text: Text, base: int
    ) -> np.ndarray:
        records = np.zeros((count - first, WORDS), np.int32)
        records[:, :4] = words
        records[:, 4] = np.arange(first, count)
        records[:, 5:7] = text.dense_from, text.dense_to
        for place, (seen, offsets) in enumerate(
            ((self.whole, self.offsets[0]), (self.partial, self.offsets[1]))
        ):
            records[:, 7 + 2 * place] = base + offsets[first:count]
            records[:, 8 + 2 * place] = seen[first:count].sum(1)
        records[:, 11] = self.own_bits[first:count]
        return records

    def key_records(
        self, words: tuple[int, ...], first: int, count: int, text: Text, base: int, num_parts: int
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """The chunks, the sums, and the number of parts so far."""
        seen, skipped = [], []
        for pairs in (self.whole, self.partial):
            seen.append(pairs[first:count, :count].sum(0))
            skipped.append(pairs[:first, :count].sum(0))
        total = seen[0] + seen[1]
        most = max(MANY_READERS, TIMES_MEAN * -(-int(total.sum()) // count))
        shares = np.maximum(1, -(-total // most))
        size = -(-total // shares)
        number = np.repeat(np.arange(count), shares)
        piece = np.arange(len(number)) - np.repeat(shares.cumsum() - shares, shares)
        low = np.minimum(piece * size[number], total[number])
        high = np.minimum(low + size[number], total[number])
        records = np.zeros((len(number), WORDS), np.int32)
        records[:, :4] = words
        records[:, 4] = number
        records[:, 5:7] = text.dense_from, text.dense_to
        border = seen[0][number]
        whole = np.minimum(low, border), np.minimum(high, border)
        partial = np.maximum(low - border, 0), np.maximum(high - border, 0)
        for place, (begin, end) in enumerate((whole, partial)):
            offsets = self.offsets[2 + place][:count] + skipped[place]
            records[:, 7 + 2 * place] = base + offsets[number] + begin
            records[:, 8 + 2 * place] = end - begin
        own = (piece == shares[number] - 1) & (number >= first)
        records[:, 11] = np.where(own, self.own_bits[number], 0)
        shared = shares[number] > 1
        parts = num_parts + np.cumsum(shared)  # a chunk's part, plus one
        records[:, 0] = np.where(shared, TEXT + 4 * parts, TEXT)
        heads = shared & (piece == 0)
        sums = records[heads].copy()
        sums[:, 0] = 1
        sums[:, 5] = parts[heads] - 1
        sums[:, 6] = shares[number[heads]]
        sums[:, 7:] = 0
        return records, sums, num_parts + int(shared.sum())


@lru_cache(maxsize=16)
def _table(pattern: Pattern, tile: int, count: int) -> _Table:
    """The lists of a text of ``count`` tiles."""
    return _listed(*_seen(pattern, tile, count))


@lru_cache(maxsize=256)
def _with_dense(
    pattern: Pattern, tile: int, count: int, dense_from: int, dense_to: int, length: int
) -> _Table:
    """The lists of a text of ``length`` tokens whose tokens dense_from to dense_to see everything before them."""
    whole, partial, own_bits, bits = (part.copy() for part in _seen(pattern, tile, count))
    parts = max(1, tile // pattern.block_size)
    begins = np.arange(count) * tile
    ends = np.minimum(begins + tile, length)
    fully = (begins >= dense_from) & (ends <= dense_to)
    partly = ~fully & (np.maximum(begins, dense_from) < np.minimum(ends, dense_to))
    earlier = np.tri(count, k=-1, dtype=bool)
    whole[fully], partial[fully] = earlier[fully], False
    own_bits[fully] = (1 << parts * parts) - 1
    partial[partly] = earlier[partly] & ~whole[partly]
    return _listed(whole, partial, own_bits, bits)


def _listed(whole: np.ndarray, partial: np.ndarray, own_bits: np.ndarray, bits: np.ndarray) -> _Table:
    """The table with its entries: by query tile, then by key tile; within each, whole tiles, then partial ones."""
    entries, offsets = [], []
    done = 0
    for turned in (False, True):
        for pairs in (whole, partial):
            pairs, marks = (pairs.T, bits.T) if turned else (pairs, bits)
            line, other = np.nonzero(pairs)
            counts = pairs.sum(1)
            offsets.append((done + counts.cumsum() - counts).astype(np.int32))
            entries.append(np.stack([other, marks[line, other]], 1).astype(np.int32))
            done += len(other)
    return _Table(whole, partial, own_bits, np.concatenate(entries), tuple(offsets))


@lru_cache(maxsize=16)
def _seen(pattern: Pattern, tile: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """whole and partial, bool [count, count]; bits for each tile's own keys, int32 [count]; bits of all pairs."""
    earlier = np.tri(count, k=-1, dtype=bool)
    nothing = np.zeros((count, count), np.int32)
    if pattern.name == "full":
        return earlier, np.zeros_like(earlier), np.ones(count, np.int32), nothing
    parts, per_block = max(1, tile // pattern.block_size), max(1, pattern.block_size // tile)
    blocks = -(-count * parts // per_block)
    sees = np.zeros((blocks, blocks), bool)
    for block in range(blocks):
        sees[block, list(pattern.visible_blocks(block))] = True
    if parts == 1:
        seen = sees.repeat(per_block, 0).repeat(per_block, 1)[:count, :count]
        return seen & earlier, np.zeros_like(earlier), np.ones(count, np.int32), nothing
    # [count, parts, count, parts] -> bits
    grouped = sees.reshape(count, parts, count, parts).transpose(0, 2, 1, 3).reshape(count, count, -1)
    bits = (grouped.astype(np.int64) << np.arange(parts * parts)).sum(2).astype(np.int32)
    whole = grouped.all(2) & earlier
    return whole, grouped.any(2) & earlier & ~whole, np.diagonal(bits).copy(), bits


def _capacity(texts: tuple[Text, ...], tile: int) -> int:
    """The number of tiles of the longest text, rounded up so that few tables are made."""
    return _room(-(-max((text.end - text.start for text in texts), default=1) // tile))


def _padding(texts: tuple[Text, ...], rows: int, tokens: int) -> list[tuple[int, int, int]]:
    """(row, start, end) of the tokens that no text covers."""
    gaps = []
    done = [0] * rows
    for text in texts:
        if text.start > done[text.row]:
            gaps.append((text.row, done[text.row], text.start))
        done[text.row] = text.end
    return gaps + [(row, end, tokens) for row, end in enumerate(done) if end < tokens]


def _heavy_first(tiles: np.ndarray) -> np.ndarray:
    """Tiles that read far more than most come first, to finish early; the others stay in order, for the caches."""
    reads = tiles[:, 8] + tiles[:, 10]
    return tiles[np.argsort(-(reads // (4 * int(reads.mean()) + 4)), kind="stable")]


def _room(count: int) -> int:
    """``count`` rounded up, by less than a quarter, to one of a few sizes."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


def _padded(records: np.ndarray) -> torch.Tensor:
    """The records, padded with zeros to a size of :func:`_room`."""
    room = np.zeros(
        (max(2, _room(len(records))), records.shape[1]), np.int32
    )  # PyTorch compiles 0 and 1 separately
    room[: len(records)] = records
    return torch.from_numpy(room)
