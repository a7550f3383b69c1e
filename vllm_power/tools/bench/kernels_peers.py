"""This project's kernels and their peers, each as a call over one layer of a ``Work``.

Every function takes (work, layer number) and returns a call without arguments. It raises ImportError if the peer is not
installed. All peers read the same paged caches, except flex, which needs contiguous keys and values.
"""

import functools
from collections.abc import Callable

import torch

from vllm_power.kernels.decode import decode
from vllm_power.kernels.kv_layout import split_cache
from vllm_power.kernels.plan import VisibleBlocks
from vllm_power.kernels.prefill import prefill
from vllm_power.pattern import POWER
from vllm_power.tools.bench.kernels_data import Work

Call = Callable[[], object]


def power(work: Work, layer: int) -> Call:
    """This project's kernels over the plan."""
    kernel = decode if work.new <= 8 else prefill
    return functools.partial(
        kernel,
        work.query,
        work.caches[layer],
        work.output,
        work.plan,
        work.shape.scale,
        max_query_len=min(work.new, POWER.block_size),
    )


def _flash_attention(
    work: Work,
    layer: int,
    start_loc: torch.Tensor,
    lengths: torch.Tensor,
    table: torch.Tensor,
    max_query: int,
    max_key: int,
) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    key_cache, value_cache = split_cache(work.caches[layer])
    return functools.partial(
        flash_attn_varlen_func,
        q=work.query,
        k=key_cache,
        v=value_cache,
        out=work.output,
        cu_seqlens_q=start_loc,
        max_seqlen_q=max_query,
        seqused_k=lengths,
        max_seqlen_k=max_key,
        block_table=table,
        softmax_scale=work.shape.scale,
        causal=True,
        fa_version=3,
    )


def dense_fa3(work: Work, layer: int) -> Call:
    """FlashAttention 3 as vLLM ships it, over all keys."""
    return _flash_attention(
        work, layer, work.query_start_loc, work.seq_lens, work.page_table, work.new, work.context
    )


def plan_fa3(work: Work, layer: int) -> Call:
    """FlashAttention 3 over the plan."""
    plan = work.merged_plan
    longest = int(plan.segment_start_loc.diff().max())
    keys = plan.segment_pages.shape[1] * work.page
    return _flash_attention(
        work, layer, plan.segment_start_loc, plan.key_lens, plan.segment_pages, longest, keys
    )


def triton_dense(work: Work, layer: int) -> Call:
    """vLLM's Triton attention over all keys, with split keys for small decode batches."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    key_cache, value_cache = split_cache(work.caches[layer])
    num_splits, most = 16, 128 // work.shape.kv_heads
    options = {}
    if work.new == 1 and work.batch <= most:
        parts = torch.empty(most, work.shape.heads, num_splits, work.shape.head_size, device="cuda")
        options = {
            "seq_threshold_3D": most,
            "num_par_softmax_segments": num_splits,
            "softmax_segm_output": parts,
            "softmax_segm_max": torch.empty_like(parts[..., 0]).contiguous(),
            "softmax_segm_expsum": torch.empty_like(parts[..., 0]).contiguous(),
        }
    return functools.partial(
        unified_attention,
        q=work.query,
        k=key_cache,
        v=value_cache,
        out=work.output,
        cu_seqlens_q=work.query_start_loc,
        max_seqlen_q=work.new,
        seqused_k=work.seq_lens,
        max_seqlen_k=work.context,
        softmax_scale=work.shape.scale,
        causal=True,
        window_size=(-1, -1),
        block_table=work.page_table,
        softcap=0.0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        **options,
    )


@functools.cache
def _flex_function() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(work: Work, layer: int) -> Call:
    """PyTorch's FlexAttention with the pattern as its block mask, over contiguous keys: one whole prompt."""
    from torch.nn.attention.flex_attention import BlockMask

    if work.batch != 1 or work.new != work.context or work.context % POWER.block_size:
        raise ImportError("measured on one whole prompt only")
    visible = VisibleBlocks.of(POWER, work.context, work.query.device)
    blocks = visible.blocks.shape[0]
    whole = torch.zeros(blocks, blocks, dtype=torch.int32, device=work.query.device)
    whole[:, : visible.blocks.shape[1]] = visible.blocks[:, :blocks]
    mask = BlockMask.from_kv_blocks(
        kv_num_blocks=torch.ones(1, 1, blocks, dtype=torch.int32, device=whole.device),
        kv_indices=torch.arange(blocks, device=whole.device)
        .int()
        .view(1, 1, -1, 1)
        .expand(-1, -1, -1, blocks)
        .contiguous(),
        full_kv_num_blocks=(visible.counts.int() - 1)[None, None],
        full_kv_indices=whole[None, None],
        BLOCK_SIZE=POWER.block_size,
        mask_mod=lambda batch, head, q, k: q >= k,
    )
    query = work.query.transpose(0, 1).contiguous()[None]
    pages = work.page_table[0].long()
    key, value = (
        cache[pages].flatten(0, 1)[: work.context].transpose(0, 1).contiguous()[None]
        for cache in split_cache(work.caches[layer])
    )
    return functools.partial(
        _flex_function(), query, key, value, block_mask=mask, scale=work.shape.scale, enable_gqa=True
    )


def xformers_plan(work: Work, layer: int) -> Call:
    """xformers' paged attention (its split-K decode) over the plan, on pages of at least 64 tokens.

    Bypasses xformers' dispatcher, which requires a C++ library built for this PyTorch; the Triton kernel does not.
    """
    from xformers.ops.fmha import Inputs, triton_splitk
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalCausalWithOffsetPaddedKeysMask

    plan, shape = work.merged_plan, work.shape
    group = shape.heads // shape.kv_heads
    bias = PagedBlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=plan.segment_start_loc.diff().tolist(),
        kv_seqlen=plan.key_lens.tolist(),
        block_tables=plan.segment_pages,
        page_size=work.page,
    )
    query = work.query.view(1, -1, shape.kv_heads, group, shape.head_size)
    key, value = (
        cache.reshape(1, -1, shape.kv_heads, 1, shape.head_size).expand(-1, -1, -1, group, -1)
        for cache in split_cache(work.caches[layer])
    )
    inputs = Inputs(query=query, key=key, value=value, attn_bias=bias, scale=shape.scale)
    other = [why for why in triton_splitk.FwOp.not_supported_reasons(inputs) if "CUDA support" not in why]
    if other:
        raise ValueError("; ".join(other))
    return functools.partial(triton_splitk.FwOp.apply, inputs, needs_gradient=False)


PREFILL = (power, plan_fa3, dense_fa3, flex, triton_dense)
DECODE = (power, plan_fa3, dense_fa3, triton_dense, xformers_plan)
