"""Decode: few query tokens per segment, the keys split over programs so that a small batch still fills the GPU.

One program attends to one split of the keys of one segment and KV head. Its query rows, packed over the heads that
share a KV head (``primitives.pack_gqa``), are one matrix tile. With more than one split, every program leaves its
output and the base-2 logarithm of its softmax sum in a workspace, and ``combine`` joins them. The number of splits
depends only on shapes, never on sequence lengths, so that captured CUDA graphs stay valid.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from vllm_power.kernels import tuning
from vllm_power.kernels.combine import combine
from vllm_power.kernels.device import capability, num_multiprocessors
from vllm_power.kernels.kv_layout import check_tensors, kernel_arguments
from vllm_power.kernels.plan import Plan
from vllm_power.kernels.primitives import LOG2_E, attend, init_softmax, load_pages, pack_gqa, row_pointers

# Rows (query tokens times heads of a group) of one tile. Longer queries are for ``prefill``.
MAX_ROWS = 128


# Numbers that vary from step to step must not cause a new variant of the kernel.
@triton.jit(do_not_specialize=["max_query_len", "num_splits"])
def _decode_kernel(
    query,
    kv_cache,
    output,
    partial_output,
    partial_lse,
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
    max_keys,
    max_query_len,
    num_kv_heads,
    num_splits,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    OVERLAP_COMBINE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if OVERLAP_COMBINE:
        gdc_launch_dependents()  # combine may start: it waits for the end of this kernel before it reads the workspace
    program = tl.program_id(0)
    split = program % num_splits
    kv_head = program // num_splits % num_kv_heads
    segment = program // (num_splits * num_kv_heads)

    start = tl.load(segment_start_loc + segment)
    num_tokens = tl.load(segment_start_loc + segment + 1) - start
    num_keys = tl.load(key_lens + segment)
    pages = segment_pages + segment.to(tl.int64) * segment_pages_stride
    # Split s has the key tiles s, s + num_splits, and so on.
    first_key = split * BLOCK_N
    if ONE_TILE:  # load before num_keys has arrived, so that both loads are in flight together
        page = load_pages(pages, first_key, max_keys, PAGE_SIZE, BLOCK_N)
    if (num_tokens <= 0) | (first_key >= num_keys):
        return

    # [BLOCK_M]
    exists, token, head = pack_gqa(tl.arange(0, BLOCK_M), num_tokens, kv_head, GROUP)
    columns = tl.arange(0, HEAD_PAD)
    in_head = columns < HEAD_SIZE
    # [BLOCK_M, HEAD_PAD]
    queries = row_pointers(query, start + token, head, columns, query_strides)
    query_tile = tl.load(queries, mask=in_head[None, :], other=0.0)

    visible_keys = num_keys - num_tokens + token + 1
    if k_scale is not None:
        scale *= tl.load(k_scale)
    if not SOFT_CAP:
        scale *= LOG2_E
    kv_cache += kv_head.to(tl.int64) * cache_strides[1]
    accumulator = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)
    row_max, row_sum = init_softmax(sinks, head, split == 0)
    if ONE_TILE:
        accumulator, row_max, row_sum = attend(
            page, first_key, visible_keys, num_keys, query_tile, accumulator, row_max, row_sum, kv_cache, columns,
            cache_strides, scale, soft_cap, True, SOFT_CAP, PRECISION, HEAD_SIZE, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip
    else:
        for key_tile in range(first_key, num_keys, num_splits * BLOCK_N):
            page = load_pages(pages, key_tile, num_keys, PAGE_SIZE, BLOCK_N)
            accumulator, row_max, row_sum = attend(
                page, key_tile, visible_keys, num_keys, query_tile, accumulator, row_max, row_sum, kv_cache,
                columns, cache_strides, scale, soft_cap, True, SOFT_CAP, PRECISION, HEAD_SIZE, PAGE_SIZE, BLOCK_N,
            )  # fmt: skip

    # A row may see no key of this split if only later draft tokens do. Its row_sum is 0, which must not give NaN.
    accumulator /= tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    if v_scale is not None:
        accumulator *= tl.load(v_scale)
    stored = exists[:, None] & in_head[None, :]
    if SPLIT:
        # [segments, max_query_len, H, num_splits, D] and the same without D
        row = segment.to(tl.int64) * max_query_len + token
        partial_rows = (row * (num_kv_heads * GROUP) + head) * num_splits + split
        tl.store(
            partial_output + partial_rows[:, None] * HEAD_SIZE + columns[None, :], accumulator, mask=stored
        )
        tl.store(partial_lse + partial_rows, row_max + tl.log2(row_sum), mask=exists)
    else:
        tl.store(
            row_pointers(output, start + token, head, columns, output_strides),
            accumulator.to(output.dtype.element_ty),
            mask=stored,
        )


def decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    max_query_len: int = 1,
    workspace: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> None:
    """Write the attention of ``query`` over the plan's visible pages into ``output``. Arguments as for ``prefill``.

    max_query_len: maximum query tokens per segment; times the heads of a group, at most ``MAX_ROWS``.
    workspace: float32 [at least ``workspace_size``], for the outputs of the splits; allocated here if None.
    num_splits: number of splits of the keys; None for the choice of ``tuning.decode_settings``.

    Raises ValueError if shapes or strides do not match, if there are too many rows, or if the workspace is too small.
    """
    check_tensors(query, kv_cache, output)
    num_heads, head_size = query.shape[1:]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    if max_query_len * group > MAX_ROWS:
        raise ValueError(
            f"{max_query_len} query tokens of {group} heads are more than {MAX_ROWS} rows: prefill takes them"
        )
    max_keys = plan.segment_pages.shape[1] * page_size
    settings, default_splits = tuning.decode_settings(
        query.dtype,
        head_size,
        max_query_len * group,
        plan.capacity * num_kv_heads,
        max_keys,
        num_multiprocessors(query.device),
    )
    max_tiles = triton.cdiv(max_keys, settings["BLOCK_N"])
    num_splits = min(num_splits or default_splits, max_tiles)
    # A kernel may start before the one it depends on has ended (programmatic dependent launch).
    overlap_combine = num_splits > 1 and capability(query.device) >= (9, 0)
    partial_output = partial_lse = None
    if num_splits > 1:
        rows = plan.capacity * max_query_len * num_heads * num_splits
        if workspace is None:
            workspace = torch.empty(rows * (head_size + 1), dtype=torch.float32, device=query.device)
        elif workspace.numel() < rows * (head_size + 1):
            raise ValueError(
                f"the workspace holds {workspace.numel()} numbers, {rows * (head_size + 1)} are needed"
            )
        partial_output, partial_lse = workspace[: rows * head_size], workspace[rows * head_size :]
    grid = (num_splits * num_kv_heads * plan.capacity,)
    _decode_kernel[grid](
        partial_output=partial_output,
        partial_lse=partial_lse,
        max_keys=max_keys,
        max_query_len=max_query_len,
        num_splits=num_splits,
        SPLIT=num_splits > 1,
        ONE_TILE=num_splits == max_tiles,
        OVERLAP_COMBINE=overlap_combine,
        **kernel_arguments(query, kv_cache, output, plan, scale, soft_cap, k_scale, v_scale, sinks),
        **settings,
    )
    if partial_output is not None and partial_lse is not None:
        combine(
            partial_output,
            partial_lse,
            output,
            plan,
            max_query_len,
            num_splits,
            settings["BLOCK_N"],
            overlap=overlap_combine,
        )


def workspace_size(
    num_heads: int, num_kv_heads: int, head_size: int, max_query_len: int, device: torch.device
) -> int:
    """Number of float32 of a workspace for any batch of segments of up to ``max_query_len`` tokens."""
    programs = tuning.wanted_programs(num_multiprocessors(device))
    return programs * max_query_len * (num_heads // num_kv_heads) * (head_size + 1)
