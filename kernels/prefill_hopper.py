"""Prefill on Hopper (compute capability 9.0): the same attention as ``prefill``, warp-specialised, in Gluon.

One resident program per multiprocessor takes tile after tile: 128 query tokens of one head of one segment. Its warps
have three roles. The producer moves queries, keys and values into shared memory with the tensor memory accelerator,
page by page, running ahead over tile borders. Two consumer warpgroups hold 64 tokens each; a consumer issues the
product of queries and the next keys together with that of weights and the previous values, and computes the softmax of
the one while the other runs. So too at the border of two tiles: no step leaves the matrix units without work. Keys are
taken from the last to the first, so that the causal mask comes before the long part.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from vllm_power.kernels.launch import launch
from vllm_power.kernels.plan import Plan
from vllm_power.kernels.prefill_hopper_consumer import consume
from vllm_power.kernels.prefill_hopper_producer import produce

BLOCK_M = 128  # query tokens of a tile, 64 a consumer
BLOCK_N = 128  # keys of a tile
# Registers of a thread at launch (12 warps), and then of a consumer and of the producer.
KERNEL_REGISTERS = 168
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
PANEL = 64  # columns of a panel: 128 bytes, the widest swizzle; tiles lie in shared memory panel by panel
QUERY_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)
CACHE_LAYOUT = gl.NVMMASharedLayout(128, 16, 4)


# Numbers that vary from step to step must not each bring a variant of the kernel.
@gluon.jit(do_not_specialize=["num_segments"])
def _prefill_kernel(
    query_descriptor, cache_descriptor, output, query_start_loc, key_lens, page_table, sinks,
    page_table_stride, output_stride_token, output_stride_head, num_used, num_segments, num_kv_heads, scale, soft_cap,
    GROUP: gl.constexpr, TILES: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr,
    SOFT_CAP: gl.constexpr,
):  # fmt: skip
    if num_used is not None:
        num_segments = gl.load(num_used)
    num_tiles = num_segments * num_kv_heads * (GROUP * TILES)
    PANELS: gl.constexpr = HEAD_SIZE // 64
    ROWS: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    PIECES: gl.constexpr = 2 * PANELS * (BLOCK_N // ROWS)
    dtype: gl.constexpr = query_descriptor.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    # Two stages of keys and values; two tiles of queries in two halves each.
    query_parts = gl.allocate_shared_memory(dtype, [4 * PANELS, 64, 1, 64], query_descriptor.layout)
    key_parts = gl.allocate_shared_memory(dtype, [PIECES, 1, 1, ROWS, 64], cache_descriptor.layout)
    value_parts = gl.allocate_shared_memory(dtype, [PIECES, 1, 1, ROWS, 64], cache_descriptor.layout)
    queries = query_parts._reinterpret(dtype, [4, 64, HEAD_SIZE], layout)
    keys = key_parts._reinterpret(dtype, [2, BLOCK_N, HEAD_SIZE], layout)
    values = value_parts._reinterpret(dtype, [2, BLOCK_N, HEAD_SIZE], layout)
    value_strips = value_parts._reinterpret(dtype, [2 * PANELS * (BLOCK_N // 16), 16, 64], layout)

    query_ready = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tail_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(4):
        mbarrier.init(query_ready.index(slot), count=1)
        mbarrier.init(query_free.index(slot), count=1)
    for stage in gl.static_range(2):
        mbarrier.init(ready.index(stage), count=2)  # once for keys, once for values
        mbarrier.init(free.index(stage), count=2)  # both consumers
    mbarrier.init(tail_ready, count=1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (consume, (
                output, queries, keys, values, query_ready, query_free, ready, free, query_start_loc, key_lens,
                sinks, num_segments, num_kv_heads, num_tiles, output_stride_token, output_stride_head, scale, soft_cap,
                GROUP, TILES, SOFT_CAP, 0,
            )),
            (consume, (
                output, queries, keys, values, query_ready, query_free, ready, free, query_start_loc, key_lens,
                sinks, num_segments, num_kv_heads, num_tiles, output_stride_token, output_stride_head, scale, soft_cap,
                GROUP, TILES, SOFT_CAP, 1,
            )),
            (produce, (
                query_descriptor, cache_descriptor, query_parts, key_parts, value_parts, value_strips, query_ready,
                query_free, ready, free, tail_ready, query_start_loc, key_lens, page_table, page_table_stride,
                num_segments, num_kv_heads, num_tiles, GROUP, TILES, PAGE_SIZE, BLOCK_N, HEAD_SIZE,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def supports(query: torch.Tensor, kv_cache: torch.Tensor) -> bool:
    """Whether this kernel takes such tensors: on Hopper, bfloat16 or float16 in both alike, heads of 64 or 128."""
    if query.device.type != "cuda" or _capability(query.device) != (9, 0):
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
    """As ``prefill``, for what ``supports`` takes."""
    num_heads, head_size = query.shape[1:]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    tiles = -(-max_query_len // BLOCK_M)
    rows = min(page_size, BLOCK_N)
    strides = (plan.page_table.stride(0), *output.stride()[:2])
    constants = (num_heads // num_kv_heads, tiles, page_size, BLOCK_N, head_size, bool(soft_cap))
    arguments = (
        TensorDescriptor.from_tensor(query, [64, 1, PANEL], QUERY_LAYOUT),
        TensorDescriptor.from_tensor(kv_cache, [1, 1, rows, PANEL], CACHE_LAYOUT),
        output, plan.query_start_loc, plan.key_lens, plan.page_table, sinks,
        *strides, plan.num_used, plan.num_segments, num_kv_heads, scale, soft_cap,
        *constants,
    )  # fmt: skip
    tensors = (output, plan.query_start_loc, plan.key_lens, plan.page_table, sinks, plan.num_used)
    variant = (query.device, query.dtype, *map(_kind, tensors), num_kv_heads, *strides, *constants)
    grid = (min(plan.num_segments * num_heads * tiles, _num_multiprocessors(query.device)), 1, 1)
    launch(_prefill_kernel, variant, grid, arguments, num_warps=4, maxnreg=KERNEL_REGISTERS)


def _kind(tensor: torch.Tensor | None) -> tuple[torch.dtype, bool] | None:
    """What Triton compiles for: the dtype, and whether the tensor is aligned to 16 bytes."""
    return None if tensor is None else (tensor.dtype, tensor.data_ptr() % 16 == 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
