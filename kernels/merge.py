"""Merge: join the pieces that the decode kernel cut the keys of a segment into."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from vllm_power.kernels.plan import Plan
from vllm_power.kernels.primitives import NO_MAXIMUM


# Numbers that vary from step to step must not each bring a variant of the kernel.
@triton.jit(do_not_specialize=["num_pieces", "max_query_len"])
def _merge_kernel(
    partial_output,
    partial_lse,
    output,
    query_start_loc,
    key_lens,
    output_strides,
    num_heads,
    num_pieces,
    max_query_len,
    OVERLAP: tl.constexpr,
    PIECES_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
):
    # [segments * max_query_len, H]
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads
    segment = row // max_query_len
    token = tl.load(query_start_loc + segment) + row % max_query_len
    if token >= tl.load(query_start_loc + segment + 1):
        return
    used = tl.minimum(tl.cdiv(tl.load(key_lens + segment), BLOCK_N), num_pieces)
    if OVERLAP:
        gdc_wait()

    pieces = tl.arange(0, PIECES_PAD)
    columns = tl.arange(0, HEAD_PAD)
    parts = (row.to(tl.int64) * num_heads + head) * num_pieces + pieces
    # [PIECES_PAD]
    lse = tl.load(partial_lse + parts, mask=pieces < used, other=float("-inf"))
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), NO_MAXIMUM))
    # [PIECES_PAD, HEAD_PAD]
    exists = (pieces < used)[:, None] & (columns < HEAD_SIZE)[None, :]
    values = tl.load(partial_output + parts[:, None] * HEAD_SIZE + columns[None, :], mask=exists, other=0.0)
    # [HEAD_PAD]
    total = tl.sum(weights, 0)
    merged = tl.sum(values * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        output + token.to(tl.int64) * output_strides[0] + head * output_strides[1] + columns,
        merged.to(output.dtype.element_ty),
        mask=columns < HEAD_SIZE,
    )


def merge(
    partial_output: torch.Tensor,
    partial_lse: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    max_query_len: int,
    num_pieces: int,
    block_n: int,
    overlap: bool = False,
) -> None:
    """Write the join of the pieces into ``output`` [T, H, D]; rows of no segment are left as they are.

    partial_output: float32, [segments, max_query_len, H, num_pieces, D] flat; each piece's own normalised output.
    partial_lse: float32, the same without D; the base-2 logarithm of each piece's softmax total.
    block_n: the tile of keys that the pieces were dealt. Pieces past the segment's keys are never read.
    overlap: start while the kernel before still runs and wait for its end only then; it must allow that.
    """
    num_heads, head_size = output.shape[1:]
    _merge_kernel[(plan.num_segments * max_query_len * num_heads,)](
        partial_output=partial_output,
        partial_lse=partial_lse,
        output=output,
        query_start_loc=plan.query_start_loc,
        key_lens=plan.key_lens,
        output_strides=output.stride()[:2],
        num_heads=num_heads,
        num_pieces=num_pieces,
        max_query_len=max_query_len,
        OVERLAP=overlap,
        PIECES_PAD=triton.next_power_of_2(num_pieces),
        BLOCK_N=block_n,
        HEAD_SIZE=head_size,
        HEAD_PAD=triton.next_power_of_2(head_size),
        num_warps=4,
        **({"launch_pdl": True} if overlap else {}),
    )
