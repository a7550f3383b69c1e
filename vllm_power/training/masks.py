"""The pattern as FlexAttention's block mask, made from the pattern's blocks: nothing is as large as queries times keys.

FlexAttention counts blocks from the start of what it is given, the pattern from the start of each text. So texts are
**aligned** first: each is moved to begin at a multiple of the mask's block. One text that begins the row needs no move.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask

from vllm_power.pattern import Pattern
from vllm_power.training.documents import Row

# FlexAttention's kernels take tiles of up to this many tokens, which must divide the mask's block.
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
    if documents == ((0, num_keys),) and num_queries == num_keys:
        return Aligned(block_mask(pattern, num_keys, device), None)
    step = max(pattern.block_size, LARGEST_TILE)
    first_query = num_keys - num_queries
    keys, queries, places, where, blocks = [], [], [], [], []
    key_place = query_place = 0
    for start, end in documents:
        length, first = end - start, max(0, first_query - start)
        room = -(-length // step) * step
        if first < length:
            begin = first // step * step
            positions = torch.arange(begin, room).clamp(first, length - 1)
            queries.append(positions + start - first_query)
            places.append(torch.arange(first, length) - begin + query_place)
            where.append(torch.arange(first, length) + start - first_query)
            blocks.append(
                (key_place // pattern.block_size, begin // pattern.block_size, room // pattern.block_size)
            )
            query_place += room - begin
        keys.append(torch.arange(room).clamp(max=length - 1) + start)
        key_place += room
    return Aligned(
        _block_mask(pattern, blocks, (query_place, key_place), device),
        Moves(*(torch.cat(indices).to(device) for indices in (keys, queries, places, where))),
    )


@lru_cache(maxsize=2)
def block_mask(pattern: Pattern, num_tokens: int, device: torch.device) -> BlockMask:
    """The mask of one whole text of ``num_tokens`` tokens, for any number of rows and heads."""
    return _block_mask(pattern, [(0, 0, pattern.num_blocks(num_tokens))], (num_tokens, num_tokens), device)


def _block_mask(
    pattern: Pattern, blocks: list[tuple[int, int, int]], lengths: tuple[int, int], device: torch.device
) -> BlockMask:
    """blocks: of each text, where its first key block stands, its first query block and its number of blocks.

    lengths: of queries and keys.
    """
    size = pattern.block_size
    step = max(size, LARGEST_TILE)
    fine = [-(-length // step) * step // size for length in lengths]
    own: list[int] = []
    rows: list[int] = []
    columns: list[int] = []
    for place, first, count in blocks:
        for block in range(first, count):
            seen = pattern.visible_blocks(block)
            rows += [len(own)] * len(seen)
            columns += [place + visible for visible in seen]
            own.append(place + block)
    own += own[-1:] * (fine[0] - len(own))

    # What each of the pattern's query blocks sees, and which key block is its own.
    sees = torch.zeros(*fine, dtype=torch.bool, device=device)
    sees[rows, columns] = True
    own_block = torch.tensor(own, device=device)

    def visible(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        row = query // size
        return sees[row, key // size] & (key <= own_block[row] * size + query % size)

    # A block of the mask is whole where every pair in it is seen and lies before the diagonal.
    parts = step // size
    grouped = sees.unflatten(0, (-1, parts)).unflatten(2, (-1, parts))
    before = torch.arange(fine[1] // parts, device=device) < (own_block[::parts] // parts)[:, None]
    whole = grouped.all(3).all(1) & before
    partial = grouped.any(3).any(1) & ~whole
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(whole), BLOCK_SIZE=step, mask_mod=visible, seq_lengths=lengths
    )


def _listed(pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of bool [query blocks, key blocks]: how many are true in each row, and which, they first."""
    order = pairs.int().argsort(dim=1, descending=True, stable=True)
    return pairs.sum(1, dtype=torch.int32)[None, None], order.int()[None, None].contiguous()
