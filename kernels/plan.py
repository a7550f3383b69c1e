"""The plan: sparse attention as dense attention over a rewritten block table.

A paged cache reaches keys through a table of pages. The new tokens of one request that lie in one query block all see
the same key blocks: all keys of the earlier ones, and their own block causally. So they form one ordinary causal
attention problem whose keys are the visible blocks, in order, their own block last. Such a run of tokens is a
**segment**; the plan lists a step's segments with a compact table of the visible pages of each. It is built once per
step and serves every layer and every kernel that supports causal, paged, variable-length attention. Keys carry their
rotary positions already, so omitting some of them changes nothing else.

Leading query blocks that see everything before them (``Pattern.dense_blocks``; 1,536 tokens by default) need no split:
with ``merge_dense`` they form one segment. Rows that see everything (``pattern.RowRule``) form a segment of their own,
over all pages up to its last row.
"""

from dataclasses import dataclass

import torch

from vllm_power.pattern import ENDLESS, EVERY_ROW, PATTERN_ROWS, Pattern, RowRule


@dataclass(frozen=True)
class Plan:
    """One step's segments. All tensors are int32 on one device; S segments (the capacity), C columns of pages.

    segment_start_loc: [S + 1], start of each segment's queries among the step's tokens.
    key_lens: [S], keys of each segment, counted over its visible pages; its last query sees all of them.
    segment_pages: [S, C], the visible pages in order of position. Entries past ``key_lens`` are 0 and never read.
    num_segments: [1], number of valid leading segments if the plan is padded to a fixed capacity (CUDA graphs); None if
        all are valid. Segments past them have no query and no key.
    """

    segment_start_loc: torch.Tensor
    key_lens: torch.Tensor
    segment_pages: torch.Tensor
    num_segments: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Segments that the plan has room for, padding included. Known on the host; launch grids follow from it."""
        return self.key_lens.shape[0]


@dataclass(frozen=True)
class VisibleBlocks:
    """The pattern as lookup tables: row q lists the blocks that query block q sees.

    blocks: int64 [Q, V], ascending, padded with 0 past the count.
    counts: int64 [Q].
    """

    pattern: Pattern
    blocks: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, pattern: Pattern, max_tokens: int, device: torch.device | str = "cpu") -> "VisibleBlocks":
        """Tables for sequences of up to ``max_tokens`` tokens."""
        rows = [pattern.visible_blocks(q) for q in range(max(1, pattern.num_blocks(max_tokens)))]
        widest = max(map(len, rows))
        return cls(
            pattern=pattern,
            blocks=torch.tensor([row + (0,) * (widest - len(row)) for row in rows], device=device),
            counts=torch.tensor([len(row) for row in rows], device=device),
        )


def build_plan(
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor,
    visible: VisibleBlocks,
    page_size: int,
    merge_dense: bool = False,
    rule: RowRule = PATTERN_ROWS,
    prompt_lens: torch.Tensor | None = None,
) -> Plan:
    """Build the plan of one step in torch, on any device. On a GPU the host waits for the number of segments.

    query_start_loc: int [R + 1], start of each request's new tokens; a request may have none.
    seq_lens: int [R], tokens of each request, including the new ones.
    page_table: int [R, P], pages of each request, one per ``page_size`` positions.
    merge_dense: keep the leading blocks that see everything before them in one segment.
    rule: which rows see everything. prompt_lens: int [R], needed if the rule has dense rows; ``EVERY_ROW`` for a
        request all of whose rows see everything.

    Raises ValueError if ``page_size`` does not divide the pattern's block.
    """
    block_size = visible.pattern.block_size
    if block_size % page_size:
        raise ValueError(f"a page of {page_size} tokens does not divide a block of {block_size}")
    num_queries = query_start_loc.diff()
    first_position = seq_lens - num_queries
    # [N]: the request, first and last position of each section: the rows of one request under one rule.
    request = torch.arange(seq_lens.shape[0], device=seq_lens.device)
    start, end = first_position, seq_lens
    is_dense = torch.zeros_like(request, dtype=torch.bool)
    if rule.has_dense_rows:
        assert prompt_lens is not None
        dense_start = torch.clamp(prompt_lens - rule.dense_tail, min=0).maximum(start).minimum(end)
        dense_end = torch.where((prompt_lens == EVERY_ROW) | rule.dense_decode, ENDLESS, prompt_lens)
        dense_end = dense_end.maximum(dense_start).minimum(end)
        edges = torch.stack([start, dense_start, dense_end, end], 1)
        start, end = edges[:, :-1].flatten(), edges[:, 1:].flatten()
        request = request.repeat_interleave(3)
        is_dense = torch.arange(request.shape[0], device=request.device) % 3 == 1
    first_block = start // block_size
    last_block = (end - 1) // block_size
    if merge_dense:
        first_block = first_block.maximum(last_block.clamp(max=visible.pattern.dense_blocks - 1))
    segments_of = torch.where(is_dense, 1, last_block - first_block + 1) * (end > start)

    # [S]: the section of each segment, and its number within the section
    section = torch.repeat_interleave(segments_of)
    number = (
        torch.arange(section.shape[0], device=section.device) - (segments_of.cumsum(0) - segments_of)[section]
    )
    request, is_dense = request[section], is_dense[section]
    block = first_block[section] + number
    block_start = block * block_size
    start = torch.where(number == 0, start[section], block_start)
    end = torch.where(is_dense, end[section], torch.minimum(end[section], block_start + block_size))
    key_lens = torch.where(is_dense, end, (visible.counts[block] - 1) * block_size + end - block_start)

    # [S, V, pages of a block]: column of each visible page in the request's table
    pages_per_block = block_size // page_size
    columns = (visible.blocks[block] * pages_per_block).unsqueeze(-1)
    columns = (columns + torch.arange(pages_per_block, device=block.device)).flatten(1)
    if rule.has_dense_rows and is_dense.any():
        every = torch.arange(-(-int(key_lens.max()) // page_size), device=block.device)
        columns = torch.nn.functional.pad(columns, (0, max(0, every.shape[0] - columns.shape[1])))
        columns[:, : every.shape[0]] = torch.where(is_dense[:, None], every, columns[:, : every.shape[0]])
    columns = columns.clamp_(max=page_table.shape[1] - 1)
    pages = page_table[request.unsqueeze(1), columns]
    used = torch.arange(pages.shape[1], device=pages.device) * page_size < key_lens.unsqueeze(1)
    return Plan(
        segment_start_loc=torch.cat(
            [query_start_loc[request] + start - first_position[request], query_start_loc[-1:]]
        ).int(),
        key_lens=key_lens.int(),
        segment_pages=(pages * used).int(),
    )
