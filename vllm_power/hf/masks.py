"""The pattern as FlexAttention's block mask, made from the pattern's blocks: nothing is as large as queries times keys.

FlexAttention counts blocks from the start of what it is given, the pattern from the start of each text. So texts are
**aligned** first: each is moved to begin at a multiple of the mask's block, unless all do already.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask

from vllm_power.hf.documents import Row
from vllm_power.pattern import Pattern

# Tokens in a block of the mask. FlexAttention's kernels take tiles of up to as many, which must divide it.
LARGEST_TILE = 128


@dataclass(frozen=True)
class Moves:
    """Where the tokens of aligned texts come from, and where the answers go. All int64.

    keys: [K'], the row's key that stands at each place; the places after a text repeat its last key.
    queries: [Q'], the same for queries, as indices among the new tokens.
    places, where: [real queries], the place of each new token that is not padding, and its index.
    """

    keys: torch.Tensor
    queries: torch.Tensor
    places: torch.Tensor
    where: torch.Tensor


@dataclass(frozen=True)
class Aligned:
    """Texts side by side, each at the beginning of a block, and the mask over them. moves: None where none moves."""

    block_mask: BlockMask
    moves: Moves | None


def aligned(
    pattern: Pattern, documents: Row, num_queries: int, num_keys: int, device: torch.device
) -> Aligned:
    """The texts of one row whose last ``num_queries`` tokens, of ``num_keys``, are new, one of them real."""
    if num_queries == num_keys and _in_place(documents, num_keys):
        return Aligned(block_mask(pattern, documents, device), None)
    first_query = num_keys - num_queries
    keys, queries, places, where, texts = [], [], [], [], []
    key_place = query_place = 0
    for start, end in documents:
        length, first = end - start, max(0, first_query - start)
        room = _whole_tiles(length)
        if first < length:
            begin = first // LARGEST_TILE * LARGEST_TILE
            positions = torch.arange(begin, room).clamp(first, length - 1)
            queries.append(positions + start - first_query)
            places.append(torch.arange(first, length) - begin + query_place)
            where.append(torch.arange(first, length) + start - first_query)
            texts.append((key_place, begin, room))
            query_place += room - begin
        keys.append(torch.arange(room).clamp(max=length - 1) + start)
        key_place += room
    return Aligned(
        _block_mask(pattern, texts, (query_place, key_place), device),
        Moves(*(torch.cat(indices).to(device) for indices in (keys, queries, places, where))),
    )


@lru_cache(maxsize=2)
def block_mask(pattern: Pattern, documents: Row, device: torch.device) -> BlockMask:
    """The mask of whole texts, one after the other, each at the beginning of a tile; for any rows and heads."""
    num_tokens = documents[-1][1]
    texts = [(start, 0, end - start) for start, end in documents]
    return _block_mask(pattern, texts, (num_tokens, num_tokens), device)


def _in_place(documents: Row, num_tokens: int) -> bool:
    """Whether the texts fill the row, each at the beginning of a tile."""
    starts, ends = zip(*documents, strict=True)
    return (0, *ends) == (*starts, num_tokens) and all(start % LARGEST_TILE == 0 for start in starts)


def _block_mask(
    pattern: Pattern, texts: list[tuple[int, int, int]], lengths: tuple[int, int], device: torch.device
) -> BlockMask:
    """The mask in blocks of one tile, whatever the pattern's: kernels that were compiled for one pattern serve all.

    texts: of each text, the place of its first key, its first query as a position in the text, both at the beginning of
    a tile, and its length. lengths: of queries and keys.
    """
    unit = min(pattern.block_size, LARGEST_TILE)
    units = [_whole_tiles(length) // unit for length in lengths]
    own: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    for place, first, length in texts:
        for number in range(first // unit, _whole_tiles(length) // unit):
            seen = _visible_units(pattern, number, unit)
            rows += [len(own)] * len(seen)
            columns += [place // unit + visible for visible in seen]
            own.append(place // unit + number)

    # What each unit of queries sees, and which unit of keys is its own.
    sees = torch.zeros(*units, dtype=torch.bool, device=device)
    sees[rows, columns] = True
    own_unit = torch.tensor(own, device=device)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        row = query // unit
        return sees[row, key // unit] & (key <= own_unit[row] * unit + query % unit)

    # A block of the mask is whole where every pair in it is seen and lies before the diagonal.
    parts = LARGEST_TILE // unit
    grouped = sees.unflatten(0, (-1, parts)).unflatten(2, (-1, parts))
    before = torch.arange(units[1] // parts, device=device) < (own_unit[::parts] // parts)[:, None]
    whole = grouped.all(3).all(1) & before
    partial = grouped.any(3).any(1) & ~whole
    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(whole), BLOCK_SIZE=LARGEST_TILE, mask_mod=visible, seq_lengths=lengths
    )


def _whole_tiles(tokens: int) -> int:
    """``tokens``, rounded up to whole tiles."""
    return -(-tokens // LARGEST_TILE) * LARGEST_TILE


def _visible_units(pattern: Pattern, number: int, unit: int) -> list[int]:
    """The units, up to its own, that a unit of queries sees; a block of the pattern is a whole number of units."""
    per_block = pattern.block_size // unit
    blocks = pattern.visible_blocks(number // per_block)
    return [
        seen
        for block in blocks
        for seen in range(block * per_block, (block + 1) * per_block)
        if seen <= number
    ]


def listed(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of bool [query blocks, key blocks]: how many are true in each row, and which, they first."""
    order = pairs.int().argsort(dim=1, descending=True, stable=True)
    return pairs.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()
