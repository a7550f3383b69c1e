"""Prefill on Hopper (compute capability 9.0): the attention of ``prefill``, in Gluon with specialized warps.

One resident program per multiprocessor takes one query tile after another: ``BLOCK_M`` query tokens of one head of one
segment. Its warps have three roles. The producer (``prefill_sm90_producer``) moves queries, keys and values into shared
memory with the tensor memory accelerator (TMA), page by page, and runs ahead across tile borders. Two consumer
warpgroups (``prefill_sm90_consumer``, which describes the software pipeline) attend with ``HALF_M`` tokens each. A
consumer issues the product of queries and the next keys together with the product of weights and the previous values,
and computes the softmax of the former while the latter runs. This also holds across the border of two query tiles, so
that every step keeps the tensor cores busy. Keys are taken from the last to the first, so that the causal mask comes
before the long unmasked part.

    producer    waits for q_empty, kv_empty    copies    TMA arrives at q_full, kv_full
    consumers   wait for q_full, kv_full       compute   arrive at kv_empty per step, at q_empty per query tile
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vllm_power.kernels.device import capability, num_multiprocessors
from vllm_power.kernels.gluon_names import reinterpreted
from vllm_power.kernels.launch import launch
from vllm_power.kernels.plan import Plan
from vllm_power.kernels.prefill_sm90_consumer import consume
from vllm_power.kernels.prefill_sm90_producer import produce
from vllm_power.kernels.prefill_sm90_tiles import (
    BLOCK_M,
    BLOCK_N,
    CONSUMERS,
    HALF_M,
    PANEL,
    STAGES,
    STRIP,
    SWIZZLE,
)

# Registers per thread: at launch (12 warps), and then of the consumers and of the producer.
KERNEL_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
# Swizzle in bytes, bits of an element, rank.
QUERY_LAYOUT = gl.NVMMASharedLayout(SWIZZLE.value, 16, 3)
CACHE_LAYOUT = gl.NVMMASharedLayout(SWIZZLE.value, 16, 4)


# Numbers that vary from step to step must not cause a new variant of the kernel.
@gluon.jit(do_not_specialize=["capacity"])
def _prefill_kernel(
    query_descriptor, cache_descriptor, output, segment_start_loc, key_lens, segment_pages, sinks,
    segment_pages_stride, output_stride_token, output_stride_head, num_segments, capacity, num_kv_heads, scale,
    soft_cap, GROUP: gl.constexpr, TILES: gl.constexpr, PAGE_SIZE: gl.constexpr, HEAD_SIZE: gl.constexpr,
    SOFT_CAP: gl.constexpr,
):  # fmt: skip
    used_segments = capacity
    if num_segments is not None:
        used_segments = gl.load(num_segments)
    num_tiles = used_segments * num_kv_heads * (GROUP * TILES)
    PANELS: gl.constexpr = HEAD_SIZE // PANEL
    ROWS: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    SLOTS: gl.constexpr = STAGES * CONSUMERS  # of halves of query tiles
    BOXES: gl.constexpr = STAGES * PANELS * (BLOCK_N // ROWS)  # of keys, and of values
    dtype: gl.constexpr = query_descriptor.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(SWIZZLE, 16, 2)
    query_boxes = gl.allocate_shared_memory(
        dtype, [SLOTS * PANELS, HALF_M, 1, PANEL], query_descriptor.layout
    )
    key_boxes = gl.allocate_shared_memory(dtype, [BOXES, 1, 1, ROWS, PANEL], cache_descriptor.layout)
    value_boxes = gl.allocate_shared_memory(dtype, [BOXES, 1, 1, ROWS, PANEL], cache_descriptor.layout)
    queries = reinterpreted(query_boxes, [SLOTS, HALF_M, HEAD_SIZE], layout)
    keys = reinterpreted(key_boxes, [STAGES, BLOCK_N, HEAD_SIZE], layout)
    values = reinterpreted(value_boxes, [STAGES, BLOCK_N, HEAD_SIZE], layout)
    value_strips = reinterpreted(value_boxes, [STAGES * PANELS * (BLOCK_N // STRIP), STRIP, PANEL], layout)

    q_full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    kv_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tail_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(kv_full.index(stage), count=2)  # once for keys, once for values
        mbarrier.init(kv_empty.index(stage), count=CONSUMERS)
    mbarrier.init(tail_full, count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (consume, (
                output, queries, keys, values, q_full, q_empty, kv_full, kv_empty, segment_start_loc, key_lens,
                sinks, used_segments, num_kv_heads, num_tiles, output_stride_token, output_stride_head, scale, soft_cap,
                GROUP, TILES, SOFT_CAP, 0,
            )),
            (consume, (
                output, queries, keys, values, q_full, q_empty, kv_full, kv_empty, segment_start_loc, key_lens,
                sinks, used_segments, num_kv_heads, num_tiles, output_stride_token, output_stride_head, scale, soft_cap,
                GROUP, TILES, SOFT_CAP, 1,
            )),
            (produce, (
                query_descriptor, cache_descriptor, query_boxes, key_boxes, value_boxes, value_strips, q_full,
                q_empty, kv_full, kv_empty, tail_full, segment_start_loc, key_lens, segment_pages, segment_pages_stride,
                used_segments, num_kv_heads, num_tiles, GROUP, TILES, PAGE_SIZE, HEAD_SIZE,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def supports(query: torch.Tensor, kv_cache: torch.Tensor) -> bool:
    """Whether this kernel takes such tensors: on Hopper, both in bfloat16 or both in float16, heads of 64 or 128."""
    if capability(query.device) != (9, 0):
        return False
    if query.dtype not in (torch.bfloat16, torch.float16) or kv_cache.dtype != query.dtype:
        return False
    strides = (*query.stride()[:-1], *kv_cache.stride()[:-1])
    return query.shape[2] in (64, 128) and not any(stride % 8 for stride in strides)


def prefill(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    max_query_len: int = 256,
) -> None:
    """Write the attention of ``query`` into ``output``. Arguments as for ``prefill.prefill``, if ``supports`` holds."""
    num_heads, head_size = query.shape[1:]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    tiles = -(-max_query_len // BLOCK_M.value)
    rows = min(page_size, BLOCK_N.value)
    strides = (plan.segment_pages.stride(0), *output.stride()[:2])
    constants = (num_heads // num_kv_heads, tiles, page_size, head_size, bool(soft_cap))
    arguments = (
        TensorDescriptor.from_tensor(query, [HALF_M.value, 1, PANEL.value], QUERY_LAYOUT),
        TensorDescriptor.from_tensor(kv_cache, [1, 1, rows, PANEL.value], CACHE_LAYOUT),
        output, plan.segment_start_loc, plan.key_lens, plan.segment_pages, sinks,
        *strides, plan.num_segments, plan.capacity, num_kv_heads, scale, soft_cap,
        *constants,
    )  # fmt: skip
    tensors = (output, plan.segment_start_loc, plan.key_lens, plan.segment_pages, sinks, plan.num_segments)
    variant = (query.device, query.dtype, *map(_kind, tensors), num_kv_heads, *strides, *constants)
    grid = (min(plan.capacity * num_heads * tiles, num_multiprocessors(query.device)), 1, 1)
    launch(_prefill_kernel, variant, grid, arguments, num_warps=4, maxnreg=KERNEL_REGISTERS)


def _kind(tensor: torch.Tensor | None) -> tuple[torch.dtype, bool] | None:
    """What Triton compiles for: the dtype, and whether the tensor is aligned to 16 bytes."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)
