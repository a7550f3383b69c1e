"""Decode: few query tokens a segment, the keys split over programs so that a small batch still fills the GPU.

One program attends to one piece of the keys of one segment and KV head. Its packed rows (``primitives.packed_rows``)
are one matrix tile. With more than one piece, each leaves its output and the logarithm of its softmax total in a
workspace, and ``merge`` joins them. How many pieces: that follows from shapes, never from lengths.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from vllm_power.kernels import tuning
from vllm_power.kernels.kv_layout import check_tensors, kernel_arguments
from vllm_power.kernels.merge import merge
from vllm_power.kernels.plan import Plan
from vllm_power.kernels.primitives import LOG2_E, attend, first_softmax, load_pages, packed_rows, row_pointers

# Rows (query tokens times heads of a group) that one tile takes; longer queries are prefill's.
MAX_ROWS = 128


# Numbers that vary from step to step must not each bring a variant of the kernel.
@triton.jit(do_not_specialize=["max_query_len", "num_pieces"])
def _decode_kernel(
    query,
    kv_cache,
    output,
    partial_output,
    partial_lse,
    query_start_loc,
    key_lens,
    page_table,
    k_scale,
    v_scale,
    sinks,
    scale,
    soft_cap,
    query_strides,
    cache_strides,
    output_strides,
    page_table_stride,
    max_keys,
    max_query_len,
    num_kv_heads,
    num_pieces,
    GROUP: tl.constexpr,
    SPLIT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    OVERLAP_MERGE: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if OVERLAP_MERGE:
        gdc_launch_dependents()  # merge may start: it waits for the end of this kernel where it needs to
    program = tl.program_id(0)
    piece = program % num_pieces
    kv_head = program // num_pieces % num_kv_heads
    segment = program // (num_pieces * num_kv_heads)

    start = tl.load(query_start_loc + segment)
    num_tokens = tl.load(query_start_loc + segment + 1) - start
    num_keys = tl.load(key_lens + segment)
    pages = page_table + segment.to(tl.int64) * page_table_stride
    # Piece p has the tiles p, p + num_pieces, and so on.
    first_key = piece * BLOCK_N
    if ONE_TILE:  # asked for before num_keys has arrived, so that the two are under way together
        page = load_pages(pages, first_key, max_keys, PAGE_SIZE, BLOCK_N)
    if (num_tokens <= 0) | (first_key >= num_keys):
        return

    # [BLOCK_M]
    exists, token, head = packed_rows(tl.arange(0, BLOCK_M), num_tokens, kv_head, GROUP)
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
    maximum, total = first_softmax(sinks, head, piece == 0)
    if ONE_TILE:
        accumulator, maximum, total = attend(
            page, first_key, visible_keys, num_keys, query_tile, accumulator, maximum, total, kv_cache, columns,
            cache_strides, scale, soft_cap, True, SOFT_CAP, PRECISION, HEAD_SIZE, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip
    else:
        for key_tile in range(first_key, num_keys, num_pieces * BLOCK_N):
            page = load_pages(pages, key_tile, num_keys, PAGE_SIZE, BLOCK_N)
            accumulator, maximum, total = attend(
                page, key_tile, visible_keys, num_keys, query_tile, accumulator, maximum, total, kv_cache,
                columns, cache_strides, scale, soft_cap, True, SOFT_CAP, PRECISION, HEAD_SIZE, PAGE_SIZE, BLOCK_N,
            )  # fmt: skip

    # Only a later draft token's row may see keys of this piece; the others have a total of 0 and must not give NaN.
    accumulator /= tl.where(total == 0.0, 1.0, total)[:, None]
    if v_scale is not None:
        accumulator *= tl.load(v_scale)
    stored = exists[:, None] & in_head[None, :]
    if SPLIT:
        # [segments, max_query_len, H, pieces, D] and the same without D
        row = segment.to(tl.int64) * max_query_len + token
        partial_rows = (row * (num_kv_heads * GROUP) + head) * num_pieces + piece
        tl.store(
            partial_output + partial_rows[:, None] * HEAD_SIZE + columns[None, :], accumulator, mask=stored
        )
        tl.store(partial_lse + partial_rows, maximum + tl.log2(total), mask=exists)
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
    num_pieces: int | None = None,
) -> None:
    """Write the attention of ``query`` over the plan's visible pages into ``output``. Arguments as for ``prefill``.

    max_query_len: the most query tokens a segment can have; times the heads of a group, at most ``MAX_ROWS``.
    workspace: float32 [at least ``workspace_size``], for the parts to be merged; without one it is allocated here.
    num_pieces: into how many pieces to cut the keys; by default ``tuning.decode_settings`` says.

    Raises ValueError for shapes or strides that do not fit together.
    """
    check_tensors(query, kv_cache, output)
    num_heads, head_size = query.shape[1:]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    group = num_heads // num_kv_heads
    if max_query_len * group > MAX_ROWS:
        raise ValueError(
            f"{max_query_len} query tokens of {group} heads are more than {MAX_ROWS} rows: prefill takes them"
        )
    max_keys = plan.page_table.shape[1] * page_size
    settings, pieces = tuning.decode_settings(
        query.dtype,
        head_size,
        max_query_len * group,
        plan.num_segments * num_kv_heads,
        max_keys,
        _num_multiprocessors(query.device),
    )
    max_tiles = triton.cdiv(max_keys, settings["BLOCK_N"])
    num_pieces = min(num_pieces or pieces, max_tiles)
    overlap_merge = num_pieces > 1 and _can_overlap(query.device)
    partial_output = partial_lse = None
    if num_pieces > 1:
        parts = plan.num_segments * max_query_len * num_heads * num_pieces
        if workspace is None:
            workspace = torch.empty(parts * (head_size + 1), dtype=torch.float32, device=query.device)
        elif workspace.numel() < parts * (head_size + 1):
            raise ValueError(
                f"the workspace holds {workspace.numel()} numbers, {parts * (head_size + 1)} are needed"
            )
        partial_output, partial_lse = workspace[: parts * head_size], workspace[parts * head_size :]
    grid = (num_pieces * num_kv_heads * plan.num_segments,)
    _decode_kernel[grid](
        partial_output=partial_output,
        partial_lse=partial_lse,
        max_keys=max_keys,
        max_query_len=max_query_len,
        num_pieces=num_pieces,
        SPLIT=num_pieces > 1,
        ONE_TILE=num_pieces == max_tiles,
        OVERLAP_MERGE=overlap_merge,
        **kernel_arguments(query, kv_cache, output, plan, scale, soft_cap, k_scale, v_scale, sinks),
        **settings,
    )
    if partial_output is not None and partial_lse is not None:
        merge(
            partial_output,
            partial_lse,
            output,
            plan,
            max_query_len,
            num_pieces,
            settings["BLOCK_N"],
            overlap=overlap_merge,
        )


def workspace_size(
    num_heads: int, num_kv_heads: int, head_size: int, max_query_len: int, device: torch.device
) -> int:
    """How many float32 a workspace needs for any batch of segments of up to ``max_query_len`` tokens."""
    programs = tuning.wanted_programs(_num_multiprocessors(device))
    return programs * max_query_len * (num_heads // num_kv_heads) * (head_size + 1)


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel may start before the one it depends on has ended (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter: enough to split
    return torch.cuda.get_device_properties(device).multi_processor_count
