"""The plan on the GPU: the same as ``plan.build_plan``, in one launch, in buffers at fixed addresses.

Only the device knows the number of segments. The plan is therefore padded to a capacity that follows from shapes;
unused segments have no query and no key. The host waits for nothing, and CUDA graphs that read the buffers stay valid.
"""

import torch
import triton
import triton.language as tl

from vllm_power.kernels.plan import Plan, VisibleBlocks
from vllm_power.pattern import EVERY_ROW, PATTERN_ROWS, RowRule

EVERY = tl.constexpr(EVERY_ROW)


@triton.jit
def _num_blocks(start, end, BLOCK_SIZE: tl.constexpr):
    """Number of blocks that contain the positions start to end - 1."""
    return tl.where(end > start, (end - 1) // BLOCK_SIZE - start // BLOCK_SIZE + 1, 0)


@triton.jit
def _edges(
    length, num_queries, prompt_lens, request, exists, DENSE_TAIL: tl.constexpr, DENSE_DECODE: tl.constexpr
):
    """First new position of a request, start and end of its dense rows; both are ``length`` if it has none."""
    first = length - num_queries
    dense_start = length
    dense_end = length
    if prompt_lens is not None:
        prompt = tl.load(prompt_lens + request, mask=exists, other=0)
        dense_start = tl.minimum(tl.maximum(tl.maximum(prompt - DENSE_TAIL, 0), first), length)
        if not DENSE_DECODE:
            dense_end = tl.minimum(tl.where(prompt == EVERY, length, tl.maximum(prompt, dense_start)), length)
    return first, dense_start, dense_end


# Numbers that vary from step to step must not cause a new variant of the kernel. Neither must alignment: the requests
# that prefill begin anywhere in the step's tensors.
@triton.jit(
    do_not_specialize=["num_requests", "capacity", "page_table_stride"],
    do_not_specialize_on_alignment=["query_start_loc", "seq_lens", "page_table", "prompt_lens"],
)
def _plan_kernel(
    query_start_loc,
    seq_lens,
    page_table,
    visible_blocks,
    visible_counts,
    prompt_lens,
    segment_start_loc,
    key_lens,
    segment_pages,
    num_segments,
    num_requests,
    capacity,
    page_table_stride,
    visible_stride,
    width,
    DENSE_TAIL: tl.constexpr,
    DENSE_DECODE: tl.constexpr,
    REQUESTS_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    segment = tl.program_id(0)
    requests = tl.arange(0, REQUESTS_PAD)
    exists = requests < num_requests
    # [REQUESTS_PAD]: number of segments of each request, and their running total
    starts = tl.load(query_start_loc + requests, mask=exists, other=0)
    num_queries = tl.load(query_start_loc + requests + 1, mask=exists, other=0) - starts
    lengths = tl.load(seq_lens + requests, mask=exists, other=0)
    first, dense_start, dense_end = _edges(
        lengths, num_queries, prompt_lens, requests, exists, DENSE_TAIL, DENSE_DECODE
    )
    counts = _num_blocks(first, dense_start, BLOCK_SIZE) + _num_blocks(dense_end, lengths, BLOCK_SIZE)
    counts = tl.where(num_queries > 0, counts + (dense_end > dense_start).to(tl.int32), 0)
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    num_tokens = tl.load(query_start_loc + num_requests)

    # The segment's request is the first one whose running total exceeds the segment's number.
    request = tl.minimum(tl.sum((ends <= segment).to(tl.int32), 0), num_requests - 1)
    number = segment - tl.sum(tl.where(requests < request, counts, 0), 0)
    used = segment < total
    request_start = tl.load(query_start_loc + request)
    length = tl.load(seq_lens + request)
    first_new, dense_start, dense_end = _edges(
        length,
        tl.load(query_start_loc + request + 1) - request_start,
        prompt_lens,
        request,
        used,
        DENSE_TAIL,
        DENSE_DECODE,
    )
    # A request's segments: pattern rows before its dense rows, the dense rows, pattern rows after them.
    before = _num_blocks(first_new, dense_start, BLOCK_SIZE)
    is_dense = used & (number == before) & (dense_end > dense_start)
    is_before = number < before
    section_start = tl.where(is_before, first_new, dense_end)
    section_end = tl.where(is_before, dense_start, length)
    number -= tl.where(is_before, 0, before + (dense_end > dense_start).to(tl.int32))
    block = tl.where(used & (is_dense == 0), section_start // BLOCK_SIZE + number, 0)
    start = tl.maximum(section_start, block * BLOCK_SIZE)
    end = tl.minimum(section_end, (block + 1) * BLOCK_SIZE)
    num_visible = tl.load(visible_counts + block)
    num_keys = tl.where(used, (num_visible - 1) * BLOCK_SIZE + end - block * BLOCK_SIZE, 0)
    start = tl.where(is_dense, dense_start, start)
    num_keys = tl.where(is_dense, dense_end, num_keys)
    if tl.program_id(1) == 0:
        tl.store(segment_start_loc + segment, tl.where(used, request_start + start - first_new, num_tokens))
        tl.store(key_lens + segment, num_keys)
        if segment == 0:
            tl.store(segment_start_loc + capacity, num_tokens)
            tl.store(num_segments, total)

    # [COLUMNS]: pages of the visible blocks; entries without keys are 0, without a lookup
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    PAGES_PER_BLOCK: tl.constexpr = BLOCK_SIZE // PAGE_SIZE
    holds_keys = columns * PAGE_SIZE < num_keys
    blocks = tl.load(
        visible_blocks + block.to(tl.int64) * visible_stride + columns // PAGES_PER_BLOCK,
        mask=holds_keys & (is_dense == 0),
        other=0,
    )
    blocks = tl.where(is_dense, columns // PAGES_PER_BLOCK, blocks)
    page_row = page_table + request.to(tl.int64) * page_table_stride
    pages = tl.load(page_row + blocks * PAGES_PER_BLOCK + columns % PAGES_PER_BLOCK, mask=holds_keys, other=0)
    tl.store(segment_pages + segment.to(tl.int64) * width + columns, pages, mask=columns < width)


class PlanBuilder:
    """Builds plans on one device, one per step, in its own buffers: a plan is valid until the next one is built.

    visible: the pattern's tables on the device, for the longest possible sequence.
    page_size: tokens of a page; divides the pattern's block.
    max_num_reqs, max_num_tokens: maximum number of requests and of new tokens of a step.
    rule: which rows see everything. If there are any, a plan is as wide as the longest sequence and ``build`` needs
        prompt lengths.

    Raises ValueError if ``page_size`` does not divide the pattern's block.
    """

    def __init__(
        self,
        visible: VisibleBlocks,
        page_size: int,
        max_num_reqs: int,
        max_num_tokens: int,
        rule: RowRule = PATTERN_ROWS,
    ) -> None:
        self.block_size = visible.pattern.block_size
        if self.block_size % page_size:
            raise ValueError(f"a page of {page_size} tokens does not divide a block of {self.block_size}")
        self.page_size = page_size
        self.rule = rule
        self.visible_blocks = visible.blocks.int()
        self.visible_counts = visible.counts.int()
        device = visible.blocks.device
        most = self.max_segments(max_num_reqs, max_num_tokens, max_num_tokens)
        width = visible.blocks.shape[int(not rule.has_dense_rows)] * (self.block_size // page_size)
        self.segment_start_loc = torch.zeros(most + 1, dtype=torch.int32, device=device)
        self.key_lens = torch.zeros(most, dtype=torch.int32, device=device)
        self.segment_pages = torch.zeros(most, width, dtype=torch.int32, device=device)
        self.num_segments = torch.zeros(1, dtype=torch.int32, device=device)

    def max_segments(self, num_reqs: int, num_tokens: int, max_query_len: int) -> int:
        """Maximum number of segments of a step with these shapes; max_query_len: maximum new tokens per request."""
        cuts = 2 if self.rule.has_dense_rows else 0  # before and after the dense rows
        per_request = 1 + triton.cdiv(max_query_len - 1, self.block_size) + cuts
        return min(num_tokens, num_reqs * per_request, (2 + cuts) * num_reqs + num_tokens // self.block_size)

    @property
    def num_bytes(self) -> int:
        """GPU memory that the builder's tensors occupy."""
        tensors = (
            self.visible_blocks,
            self.visible_counts,
            self.segment_start_loc,
            self.key_lens,
            self.segment_pages,
            self.num_segments,
        )
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def build(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        page_table: torch.Tensor,
        num_tokens: int,
        max_query_len: int,
        prompt_lens: torch.Tensor | None = None,
    ) -> Plan:
        """Build the plan of one step, padded to ``max_segments``. The host waits for nothing.

        query_start_loc: int32 [R + 1]. seq_lens: int32 [R], including new tokens. page_table: int32 [R, P]; columns
        past a request's pages may hold anything. A request without new tokens (padding) may have any length.
        num_tokens, max_query_len: bounds known to the host, on the step's tokens and on the new tokens of a request.
        prompt_lens: int32 [R], prompt tokens of each request, or ``EVERY_ROW``; None if the rule has no dense rows.

        Unused segments start and end at the number of real tokens; their key lengths and pages are 0.

        Raises ValueError if the buffers are too small for such a step.
        """
        num_reqs = seq_lens.shape[0]
        capacity = self.max_segments(num_reqs, num_tokens, max_query_len)
        if capacity > self.key_lens.shape[0]:
            raise ValueError(
                f"{capacity} segments are more than the {self.key_lens.shape[0]} there is room for"
            )
        width = self.segment_pages.shape[1]
        columns = min(1024, triton.next_power_of_2(width))
        _plan_kernel[(capacity, triton.cdiv(width, columns))](
            query_start_loc=query_start_loc,
            seq_lens=seq_lens,
            page_table=page_table,
            visible_blocks=self.visible_blocks,
            visible_counts=self.visible_counts,
            prompt_lens=prompt_lens,
            segment_start_loc=self.segment_start_loc,
            key_lens=self.key_lens,
            segment_pages=self.segment_pages,
            num_segments=self.num_segments,
            num_requests=num_reqs,
            capacity=capacity,
            page_table_stride=page_table.stride(0),
            visible_stride=self.visible_blocks.stride(0),
            width=width,
            DENSE_TAIL=self.rule.dense_tail,
            DENSE_DECODE=self.rule.dense_decode,
            REQUESTS_PAD=triton.next_power_of_2(num_reqs),
            BLOCK_SIZE=self.block_size,
            PAGE_SIZE=self.page_size,
            COLUMNS=columns,
            num_warps=4,
        )
        return Plan(
            segment_start_loc=self.segment_start_loc[: capacity + 1],
            key_lens=self.key_lens[:capacity],
            segment_pages=self.segment_pages[:capacity],
            num_segments=self.num_segments,
        )
