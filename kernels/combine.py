"""Combine: join the outputs of the splits that the decode kernel made of each segment's keys."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vllm_power.kernels.plan import Plan
from vllm_power.kernels.primitives import NO_MAXIMUM


# Numbers that vary from step to step must not cause a new variant of the kernel.
@triton.jit(do_not_specialize=["num_splits", "max_query_len"])
def _combine_kernel(
    partial_output,
    partial_lse,
    output,
    segment_start_loc,
    key_lens,
    output_strides,
    num_heads,
    num_splits,
    max_query_len,
    OVERLAP: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    # [segments * max_query_len, H]
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads
    segment = row // max_query_len
    token = tl.load(segment_start_loc + segment) + row % max_query_len
    if token >= tl.load(segment_start_loc + segment + 1):
        return
    used = tl.minimum(tl.cdiv(tl.load(key_lens + segment), BLOCK_N), num_splits)
    if OVERLAP:
        gdc_wait()

    splits = tl.arange(0, SPLITS_PAD)
    columns = tl.arange(0, HEAD_PAD)
    partial_rows = (row.to(tl.int64) * num_heads + head) * num_splits + splits
    # [SPLITS_PAD]
    lse = tl.load(partial_lse + partial_rows, mask=splits < used, other=float("-inf"))
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), NO_MAXIMUM))
    # [SPLITS_PAD, HEAD_PAD]
    exists = (splits < used)[:, None] & (columns < HEAD_SIZE)[None, :]
    values = tl.load(
        partial_output + partial_rows[:, None] * HEAD_SIZE + columns[None, :], mask=exists, other=0.0
    )
    # [HEAD_PAD]
    weight_sum = tl.sum(weights, 0)
    combined = tl.sum(values * weights[:, None], 0) / tl.where(weight_sum == 0.0, 1.0, weight_sum)
    tl.store(
        output + token.to(tl.int64) * output_strides[0] + head * output_strides[1] + columns,
        combined.to(output.dtype.element_ty),
        mask=columns < HEAD_SIZE,
    )


def combine(
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    max_query_len: int,
    num_splits: int,
    block_n: int,
    overlap: bool = False,
) -> None:
    """Write the combined output of the splits into ``output`` [T, H, D]; rows of no segment stay unchanged.

    partial_output: float32, [segments, max_query_len, H, num_splits, D] flat; the normalized output of each split.
    partial_lse: float32, the same without D; the base-2 logarithm of each split's softmax sum.
    block_n: keys per tile of the decode kernel. Splits past the segment's keys are never read.
    overlap: start while the decode kernel still runs and wait for its end before reading; it must allow this.
    """
    num_heads, head_size = output.shape[1:]
    _combine_kernel[(plan.capacity * max_query_len * num_heads,)](
        partial_output=partial_output,
        partial_lse=partial_lse,
        output=output,
        segment_start_loc=plan.segment_start_loc,
        key_lens=plan.key_lens,
        output_strides=output.stride()[:2],
        num_heads=num_heads,
        num_splits=num_splits,
        max_query_len=max_query_len,
        OVERLAP=overlap,
        SPLITS_PAD=triton.next_power_of_2(num_splits),
        BLOCK_N=block_n,
        HEAD_SIZE=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )
