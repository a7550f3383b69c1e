"""Prefill: causal attention of a plan's segments over a paged cache, for any number of query tokens per segment.

One program computes BLOCK_M rows of one segment and one KV head. Rows are packed over the heads that share a KV head
(``primitives.pack_gqa``), so that the tile is full for any number of heads. The keys of a segment are its visible pages
in order; only the last ones, the segment's own tokens, need the causal mask.
"""

import torch
import triton
import triton.language as tl

from vllm_power.kernels import prefill_sm90, tuning
from vllm_power.kernels.kv_layout import check_tensors, kernel_arguments
from vllm_power.kernels.plan import Plan
from vllm_power.kernels.primitives import LOG2_E, attend, init_softmax, load_pages, pack_gqa, row_pointers


# Numbers that vary from step to step must not cause a new variant of the kernel.
@triton.jit(do_not_specialize=["tiles_per_segment"])
def _prefill_kernel(
    query,
    kv_cache,
    output,
    segment_start_loc,
    key_lens,
    segment_pages,
    k_scale,
    v_scale,
    sinks,
    scale,
    soft_cap,
    query_strides,
    cache_strides,
    output_strides,
    segment_pages_stride,
    num_kv_heads,
    tiles_per_segment,
    GROUP: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Tiles that share keys run next to each other: rows fastest, then KV heads, then segments.
    program = tl.program_id(0)
    tile = program % tiles_per_segment
    kv_head = program // tiles_per_segment % num_kv_heads
    segment = program // (tiles_per_segment * num_kv_heads)

    start = tl.load(segment_start_loc + segment)
    num_tokens = tl.load(segment_start_loc + segment + 1) - start
    if tile * BLOCK_M >= num_tokens * GROUP:
        return
    num_keys = tl.load(key_lens + segment)

    # [BLOCK_M]
    exists, token, head = pack_gqa(tile * BLOCK_M + tl.arange(0, BLOCK_M), num_tokens, kv_head, GROUP)
    columns = tl.arange(0, HEAD_PAD)
    in_head = columns < HEAD_SIZE
    # [BLOCK_M, HEAD_PAD]
    queries = row_pointers(query, start + token, head, columns, query_strides)
    query_tile = tl.load(queries, mask=in_head[None, :], other=0.0)

    visible_keys = num_keys - num_tokens + token + 1
    first_token = tile * BLOCK_M // GROUP
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, num_tokens - 1)
    whole_tiles = (num_keys - num_tokens + first_token + 1) // BLOCK_N * BLOCK_N
    tile_end = num_keys - num_tokens + last_token + 1

    if k_scale is not None:
        scale *= tl.load(k_scale)
    if not SOFT_CAP:
        scale *= LOG2_E
    pages = segment_pages + segment.to(tl.int64) * segment_pages_stride
    kv_cache += kv_head.to(tl.int64) * cache_strides[1]
    accumulator = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    row_max, row_sum = init_softmax(sinks, head, True)
    for first_key in range(0, whole_tiles, BLOCK_N):
        page = load_pages(pages, first_key, num_keys, PAGE_SIZE, BLOCK_N)
        accumulator, row_max, row_sum = attend(
            page, first_key, visible_keys, num_keys, query_tile, accumulator, row_max, row_sum, kv_cache, columns,
            cache_strides, scale, soft_cap, False, SOFT_CAP, PRECISION, HEAD_SIZE, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip
    for first_key in range(whole_tiles, tile_end, BLOCK_N):
        page = load_pages(pages, first_key, num_keys, PAGE_SIZE, BLOCK_N)
        accumulator, row_max, row_sum = attend(
            page, first_key, visible_keys, num_keys, query_tile, accumulator, row_max, row_sum, kv_cache, columns,
            cache_strides, scale, soft_cap, True, SOFT_CAP, PRECISION, HEAD_SIZE, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip

    # row_sum is 0 in rows of dummy steps, which have no keys.
    accumulator /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if v_scale is not None:
        accumulator *= tl.load(v_scale)
    tl.store(
        row_pointers(output, start + token, head, columns, output_strides),
        accumulator.to(output.dtype.element_ty),
        mask=exists[:, None] & in_head[None, :],
    )


def prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    max_query_len: int = 256,
) -> None:
    """Write the attention of ``query`` over the plan's visible pages into ``output``.

    query, output: [T, H, D] in bfloat16, float16 or float32. Rows of no segment stay unchanged.
    kv_cache: [pages, G, page_size, 2 * D], keys before values, in the same dtype or float8_e4m3fn; any strides but the
        last.
    plan: its segments have at most ``max_query_len`` query tokens (a bound from the host; the pattern's block at most).
    scale: of the scores, before the softmax. soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 for none.
    k_scale, v_scale: float32 scalars on the device, factors of stored keys and values; None for 1.
    sinks: [H], a score in each head's softmax that belongs to no key (attention sinks), or None.

    Raises ValueError if shapes or strides do not match.
    """
    check_tensors(query, kv_cache, output)
    scaled = k_scale is not None or v_scale is not None
    if max_query_len >= tuning.SM90_MIN_QUERY_LEN and not scaled and prefill_sm90.supports(query, kv_cache):
        prefill_sm90.prefill(query, kv_cache, output, plan, scale, soft_cap, sinks, max_query_len)
        return
    num_heads, head_size = query.shape[1:]
    num_kv_heads = kv_cache.shape[1]
    rows = max_query_len * (num_heads // num_kv_heads)
    settings = tuning.prefill_settings(query.dtype, kv_cache.dtype, head_size, rows)
    tiles_per_segment = triton.cdiv(rows, settings["BLOCK_M"])
    _prefill_kernel[(tiles_per_segment * num_kv_heads * plan.capacity,)](
        tiles_per_segment=tiles_per_segment,
        **kernel_arguments(query, kv_cache, output, plan, scale, soft_cap, k_scale, v_scale, sinks),
        **settings,
    )
