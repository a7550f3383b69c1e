"""Prefill on Hopper (compute capability 9.0): the same attention as ``prefill``, warp-specialised, in Gluon.

One resident program per multiprocessor takes tile after tile: 128 query tokens of one head of one segment. Its warps
have three roles. The producer moves queries, keys and values into shared memory with the tensor memory accelerator,
page by page, running ahead over tile borders. Two consumer warpgroups hold 64 tokens each; a consumer issues the product of
queries and the next keys together with that of weights and the previous values, and computes the softmax of the one
while the other runs. Keys are taken from the last to the first, so that the causal mask comes before the long part.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from vllm_power.kernels.plan import Plan
from vllm_power.kernels.primitives import LOG2_E, NO_MAXIMUM

BLOCK_M = 128  # query tokens of a tile, 64 a consumer
# Registers of a thread at launch (12 warps), and then of a consumer and of the producer.
KERNEL_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
PANEL = 64  # columns of a panel: 128 bytes, the widest swizzle; tiles lie in shared memory panel by panel


@gluon.jit
def _indices(tile, num_segments, num_kv_heads, GROUP: gl.constexpr, TILES: gl.constexpr):
    """Segment, KV head, query head and first token of a tile.

    The last segments, which have the most keys, come first, and tiles that share keys come next to each other.
    """
    per_segment = num_kv_heads * (GROUP * TILES)
    segment = num_segments - 1 - tile // per_segment
    kv_head = tile % per_segment // (GROUP * TILES)
    head = kv_head * GROUP + tile % GROUP
    first_token = tile % (GROUP * TILES) // GROUP * 128
    return segment, kv_head, head, first_token


@gluon.jit
def _end_key(first_token, num_tokens, num_keys):
    """Where the keys of a tile end; 0 or less where it has no query token."""
    end_key = num_keys - num_tokens + gl.minimum(first_token + 128, num_tokens)
    return gl.where(first_token < num_tokens, end_key, 0)


@gluon.jit
def _copy_tile(
    descriptor, pages, kv_head, first_key, num_keys, ready, pieces, stage,
    PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Start the copy of one tile of keys or values into its stage; page by page, where a page is less than a tile.

    pieces: [stages * panels * pages of a tile, 1, 1, rows, PANEL]. Where the keys end, the last page is copied again.
    """
    ROWS: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    PANELS: gl.constexpr = HEAD_SIZE // 64
    mbarrier.expect(ready, BLOCK_N * HEAD_SIZE * 2)
    for piece in gl.static_range(BLOCK_N // ROWS):
        key = gl.minimum(first_key + piece * ROWS, (num_keys - 1) // ROWS * ROWS)
        page = gl.load(pages + key // PAGE_SIZE)
        for panel in gl.static_range(PANELS):
            target = pieces.index((stage * PANELS + panel) * (BLOCK_N // ROWS) + piece)
            tma.async_copy_global_to_shared(
                descriptor, [page, kv_head, key % PAGE_SIZE, panel * 64], ready, target
            )


@gluon.jit
def _clear_rows(strips, stage, first_row, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr):
    """Zero a stage's rows of values from first_row on. strips: [stages * panels * BLOCK_N / 16, 16, PANEL]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for strip in range(first_row // 16, BLOCK_N // 16):
        for panel in gl.static_range(HEAD_SIZE // 64):
            part = strips.index((stage * (HEAD_SIZE // 64) + panel) * (BLOCK_N // 16) + strip)
            kept = (strip * 16 + rows < first_row)[:, None]
            part.store(gl.where(kept, part.load(layout), 0.0))


@gluon.jit
def _producer(
    query_descriptor, key_descriptor, value_descriptor, queries, keys, values, value_rows, barriers, plan, sizes,
    GROUP: gl.constexpr, TILES: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr,
    HEAD_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    query_ready, query_free, key_ready, key_free, value_ready, value_free, tail_ready = barriers
    query_start_loc, key_lens, page_table, page_table_stride = plan
    num_segments, num_kv_heads, num_tiles = sizes
    PANELS: gl.constexpr = HEAD_SIZE // 64
    count = 0  # key tiles so far
    done = 0  # query tiles so far
    tails = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        segment, kv_head, head, first_token = _indices(tile, num_segments, num_kv_heads, GROUP, TILES)
        start = gl.load(query_start_loc + segment)
        num_keys = gl.load(key_lens + segment)
        end_key = _end_key(first_token, gl.load(query_start_loc + segment + 1) - start, num_keys)
        if end_key > 0:
            pages = page_table + segment.to(gl.int64) * page_table_stride
            for half in gl.static_range(2):
                slot = (done & 1) * 2 + half
                mbarrier.wait(query_free.index(slot), (done >> 1) & 1 ^ 1)
                mbarrier.expect(query_ready.index(slot), 64 * HEAD_SIZE * 2)
                for panel in gl.static_range(PANELS):
                    tma.async_copy_global_to_shared(
                        query_descriptor,
                        [start + first_token + half * 64, head, panel * 64],
                        query_ready.index(slot),
                        queries.index(slot * PANELS + panel),
                    )
            done += 1
            last = (end_key - 1) // BLOCK_N
            for step in range(last + 1):
                first_key = (last - step) * BLOCK_N
                stage = count % STAGES
                phase = (count // STAGES) & 1
                mbarrier.wait(key_free.index(stage), phase ^ 1)
                _copy_tile(
                    key_descriptor, pages, kv_head, first_key, num_keys, key_ready.index(stage), keys, stage,
                    PAGE_SIZE, BLOCK_N, HEAD_SIZE,
                )  # fmt: skip
                mbarrier.wait(value_free.index(stage), phase ^ 1)
                if first_key + BLOCK_N > num_keys:
                    # The tile holds rows past the keys, which may be NaN: a weight of 0 would not hide them.
                    _copy_tile(
                        value_descriptor, pages, kv_head, first_key, num_keys, tail_ready, values, stage,
                        PAGE_SIZE, BLOCK_N, HEAD_SIZE,
                    )  # fmt: skip
                    mbarrier.wait(tail_ready, tails & 1)
                    tails += 1
                    _clear_rows(value_rows, stage, num_keys - first_key, BLOCK_N, HEAD_SIZE)
                    fence_async_shared()
                    mbarrier.arrive(value_ready.index(stage), count=1)
                else:
                    _copy_tile(
                        value_descriptor, pages, kv_head, first_key, num_keys, value_ready.index(stage), values, stage,
                        PAGE_SIZE, BLOCK_N, HEAD_SIZE,
                    )  # fmt: skip
                count += 1


@gluon.jit
def _softmax(scores, maximum, total, scale, soft_cap, SOFT_CAP: gl.constexpr):
    """The running softmax over scores [64, BLOCK_N]: weights, the factor for what was before, new maximum and total."""
    if SOFT_CAP:
        bent = 1.0 - 2.0 / (gl.exp2(scores * (2.0 * LOG2_E * scale / soft_cap)) + 1.0)
        scores = bent
        scale = soft_cap * LOG2_E
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maximum[:, None])
    decay = gl.exp2(maximum - new_maximum)
    return weights, decay, new_maximum, total * decay + gl.sum(weights, 1)


@gluon.jit
def _step(
    query, keys, values, barriers, count, more, first_key, diagonal, weights, accumulator, maximum, total,
    scale, soft_cap,
    MASK: gl.constexpr, SOFT_CAP: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    score_layout: gl.constexpr, weight_layout: gl.constexpr,
):  # fmt: skip
    """Scores of key tile number count, while the weights of the one before it meet its values; then the softmax.

    The first keys of a query tile come here while the last weights of the tile before are still to meet their values;
    then accumulator is that tile's and returned whole, and maximum and total have to be fresh.
    """
    query_ready, query_free, key_ready, key_free, value_ready, value_free, tail_ready = barriers
    stage = count % STAGES
    before = (count + STAGES - 1) % STAGES
    # [64, BLOCK_N]
    scores = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
    weights = gl.convert_layout(weights.to(query.dtype), weight_layout)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    mbarrier.wait(value_ready.index(before), ((count - 1) // STAGES) & 1, pred=count > 0)
    # [64, HEAD_SIZE]
    accumulator = warpgroup_mma(weights, values.index(before), accumulator, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(key_free.index(stage), count=1)
    if MASK:
        # Tokens past the segment's end see keys past its keys: zeros or what was there; nobody reads those rows.
        visible = diagonal - first_key + gl.arange(0, 64, gl.SliceLayout(1, score_layout))
        offsets = gl.arange(0, BLOCK_N, gl.SliceLayout(0, score_layout))
        scores = gl.where(offsets[None, :] <= visible[:, None], scores, float("-inf"))
    new_weights, decay, maximum, total = _softmax(scores, maximum, total, scale, soft_cap, SOFT_CAP)
    # Waiting for the next keys here and not above also keeps the compiler from moving the next line before the softmax.
    mbarrier.wait(key_ready.index((count + 1) % STAGES), ((count + 1) // STAGES) & 1, pred=more)
    accumulator, new_weights = warpgroup_mma_wait(0, deps=[accumulator, new_weights])
    mbarrier.arrive(value_free.index(before), count=1, pred=count > 0)
    return new_weights, decay, accumulator, maximum, total


@gluon.jit
def _decayed(accumulator, decay):
    return accumulator * gl.convert_layout(decay, gl.SliceLayout(1, accumulator.type.layout))[:, None]


@gluon.jit
def _store(output, accumulator, total, first_token, num_tokens, stride_token):
    """Write the finished rows of a tile; output: where its head begins in the segment's first token."""
    layout: gl.constexpr = accumulator.type.layout
    tokens = first_token + gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, accumulator.shape[1], gl.SliceLayout(0, layout))
    accumulator = _decayed(accumulator, 1.0 / total)
    # [64, HEAD_SIZE]
    pointers = output + tokens[:, None] * stride_token + columns[None, :]
    gl.store(pointers, accumulator.to(output.dtype.element_ty), mask=(tokens < num_tokens)[:, None])


@gluon.jit
def _consumer(
    output, queries, keys, values, barriers, plan, sizes, output_stride_token, output_stride_head, scale, soft_cap,
    GROUP: gl.constexpr, TILES: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr, STAGES: gl.constexpr,
    SOFT_CAP: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    query_ready, query_free, key_ready, key_free, value_ready, value_free, tail_ready = barriers
    query_start_loc, key_lens, page_table, page_table_stride = plan
    num_segments, num_kv_heads, num_tiles = sizes
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    output_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, output_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    if not SOFT_CAP:
        scale *= LOG2_E
    # What the first step of a tile finishes: the tile before. There is none yet: no tokens.
    weights = gl.zeros([64, BLOCK_N], gl.float32, score_layout)
    accumulator = gl.zeros([64, HEAD_SIZE], gl.float32, output_layout)
    total = gl.full([64], 1.0, gl.float32, row_layout)
    finished = output
    finished_first = 0
    finished_tokens = 0
    count = 0
    done = 0
    segment, kv_head, head, first_token = _indices(gl.program_id(0), num_segments, num_kv_heads, GROUP, TILES)
    next_start = gl.load(query_start_loc + segment)
    next_end = gl.load(query_start_loc + segment + 1)
    next_keys = gl.load(key_lens + segment)
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        segment, kv_head, head, first_token = _indices(tile, num_segments, num_kv_heads, GROUP, TILES)
        start = next_start
        num_tokens = next_end - next_start
        num_keys = next_keys
        # Look the next tile up now: its numbers arrive while this one is computed.
        next_tile = gl.minimum(tile + gl.num_programs(0), num_tiles - 1)
        segment, kv_head, next_head, next_token = _indices(
            next_tile, num_segments, num_kv_heads, GROUP, TILES
        )
        next_start = gl.load(query_start_loc + segment)
        next_end = gl.load(query_start_loc + segment + 1)
        next_keys = gl.load(key_lens + segment)
        end_key = _end_key(first_token, num_tokens, num_keys)
        if end_key > 0:
            # Key that the first token of this half sees last
            diagonal = num_keys - num_tokens + first_token + HALF * 64
            last = (end_key - 1) // BLOCK_N
            whole = (
                num_keys - num_tokens + first_token + 1
            ) // BLOCK_N  # tiles of keys that every token sees whole
            masked_steps = gl.maximum(last - whole, 0)

            # [64, HEAD_SIZE]
            query = queries.index((done & 1) * 2 + HALF)
            mbarrier.wait(query_ready.index((done & 1) * 2 + HALF), (done >> 1) & 1)
            mbarrier.wait(key_ready.index(count % STAGES), (count // STAGES) & 1)
            maximum = gl.full([64], NO_MAXIMUM, gl.float32, row_layout)
            new_total = gl.zeros([64], gl.float32, row_layout)
            weights, decay, accumulator, maximum, new_total = _step(
                query, keys, values, barriers, count, last > 0, last * BLOCK_N, diagonal, weights, accumulator,
                maximum, new_total, scale, soft_cap, True, SOFT_CAP, BLOCK_N, STAGES, score_layout, weight_layout,
            )  # fmt: skip
            _store(finished, accumulator, total, finished_first, finished_tokens, output_stride_token)
            accumulator = gl.zeros([64, HEAD_SIZE], gl.float32, output_layout)
            total = new_total
            count += 1
            for step in range(masked_steps):
                weights, decay, accumulator, maximum, total = _step(
                    query, keys, values, barriers, count, step + 1 < last, (last - 1 - step) * BLOCK_N, diagonal,
                    weights, accumulator, maximum, total, scale, soft_cap, True, SOFT_CAP, BLOCK_N, STAGES,
                    score_layout, weight_layout,
                )  # fmt: skip
                accumulator = _decayed(accumulator, decay)
                count += 1
            for step in range(last - masked_steps):
                weights, decay, accumulator, maximum, total = _step(
                    query, keys, values, barriers, count, step + 1 < last - masked_steps, 0, diagonal,
                    weights, accumulator, maximum, total, scale, soft_cap, False, SOFT_CAP, BLOCK_N, STAGES,
                    score_layout, weight_layout,
                )  # fmt: skip
                accumulator = _decayed(accumulator, decay)
                count += 1
            mbarrier.arrive(query_free.index((done & 1) * 2 + HALF), count=1)
            done += 1
            finished = output + (start.to(gl.int64) * output_stride_token + head * output_stride_head)
            finished_first = first_token + HALF * 64
            finished_tokens = num_tokens

    if done > 0:
        before = (count - 1) % STAGES
        mbarrier.wait(value_ready.index(before), ((count - 1) // STAGES) & 1)
        last_weights = gl.convert_layout(weights.to(values.dtype), weight_layout)
        accumulator = warpgroup_mma(last_weights, values.index(before), accumulator)
        _store(finished, accumulator, total, finished_first, finished_tokens, output_stride_token)


@gluon.jit
def _prefill_kernel(
    query_descriptor, key_descriptor, value_descriptor, output, query_start_loc, key_lens, page_table,
    page_table_stride, output_stride_token, output_stride_head, num_segments, num_kv_heads, num_tiles, scale, soft_cap,
    GROUP: gl.constexpr, TILES: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr,
    STAGES: gl.constexpr, SOFT_CAP: gl.constexpr,
):  # fmt: skip
    PANELS: gl.constexpr = HEAD_SIZE // 64
    ROWS: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    dtype: gl.constexpr = query_descriptor.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    query_parts = gl.allocate_shared_memory(dtype, [4 * PANELS, 64, 1, 64], query_descriptor.layout)
    key_parts = gl.allocate_shared_memory(
        dtype, [STAGES * PANELS * (BLOCK_N // ROWS), 1, 1, ROWS, 64], key_descriptor.layout
    )
    value_parts = gl.allocate_shared_memory(
        dtype, [STAGES * PANELS * (BLOCK_N // ROWS), 1, 1, ROWS, 64], value_descriptor.layout
    )
    queries = query_parts._reinterpret(dtype, [4, 64, HEAD_SIZE], layout)
    keys = key_parts._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_SIZE], layout)
    values = value_parts._reinterpret(dtype, [STAGES, BLOCK_N, HEAD_SIZE], layout)
    value_strips = value_parts._reinterpret(dtype, [STAGES * PANELS * (BLOCK_N // 16), 16, 64], layout)

    query_ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tail_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(4):
        mbarrier.init(query_ready.index(slot), count=1)
        mbarrier.init(query_free.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=2)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=2)
    mbarrier.init(tail_ready, count=1)
    fence_async_shared()

    barriers = (query_ready, query_free, key_ready, key_free, value_ready, value_free, tail_ready)
    plan = (query_start_loc, key_lens, page_table, page_table_stride)
    sizes = (num_segments, num_kv_heads, num_tiles)
    gl.warp_specialize(
        [
            (_consumer, (
                output, queries, keys, values, barriers, plan, sizes, output_stride_token, output_stride_head, scale,
                soft_cap, GROUP, TILES, BLOCK_N, HEAD_SIZE, STAGES, SOFT_CAP, 0,
            )),
            (_consumer, (
                output, queries, keys, values, barriers, plan, sizes, output_stride_token, output_stride_head, scale,
                soft_cap, GROUP, TILES, BLOCK_N, HEAD_SIZE, STAGES, SOFT_CAP, 1,
            )),
            (_producer, (
                query_descriptor, key_descriptor, value_descriptor, query_parts, key_parts, value_parts, value_strips,
                barriers, plan, sizes, GROUP, TILES, PAGE_SIZE, BLOCK_N, HEAD_SIZE, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def supports(query: torch.Tensor, key_cache: torch.Tensor) -> bool:
    """Whether this kernel takes such tensors: on Hopper, bfloat16 or float16 in both alike, heads of 64 or 128."""
    if query.device.type != "cuda" or _capability(query.device) != (9, 0):
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or key_cache.dtype != query.dtype:
        return False
    aligned = all(stride % 8 == 0 for tensor in (query, key_cache) for stride in tensor.stride()[:-1])
    return query.shape[2] in (64, 128) and aligned


def prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    scale: float,
    soft_cap: float = 0.0,
    max_query_len: int = 256,
) -> None:
    """As ``prefill``, for what ``supports`` takes."""
    num_heads, head_size = query.shape[1:]
    page_size, num_kv_heads = key_cache.shape[1:3]
    group = num_heads // num_kv_heads
    block_n = 128
    tiles = -(-max_query_len // BLOCK_M)
    num_tiles = plan.num_segments * num_heads * tiles
    rows = min(page_size, block_n)
    flat = gl.NVMMASharedLayout(128, 16, 3)
    paged = gl.NVMMASharedLayout(128, 16, 4)
    _prefill_kernel[(min(num_tiles, _num_multiprocessors(query.device)),)](
        query_descriptor=TensorDescriptor.from_tensor(query, [64, 1, PANEL], flat),
        key_descriptor=TensorDescriptor.from_tensor(key_cache.transpose(1, 2), [1, 1, rows, PANEL], paged),
        value_descriptor=TensorDescriptor.from_tensor(
            value_cache.transpose(1, 2), [1, 1, rows, PANEL], paged
        ),
        output=output,
        query_start_loc=plan.query_start_loc,
        key_lens=plan.key_lens,
        page_table=plan.page_table,
        page_table_stride=plan.page_table.stride(0),
        output_stride_token=output.stride(0),
        output_stride_head=output.stride(1),
        num_segments=plan.num_segments,
        num_kv_heads=num_kv_heads,
        num_tiles=num_tiles,
        scale=scale,
        soft_cap=soft_cap,
        GROUP=group,
        TILES=tiles,
        PAGE_SIZE=page_size,
        BLOCK_N=block_n,
        HEAD_SIZE=head_size,
        STAGES=2,
        SOFT_CAP=bool(soft_cap),
        num_warps=4,
        maxnreg=KERNEL_REGISTERS,
    )


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
