"""vLLM's own FlashAttention over the plan (vllm/vllm_flash_attn/flash_attn_interface.py)."""

from functools import cache

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from vllm_power.executors import Part


def attend(
    part: Part,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    soft_cap: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """``executors.Attend``. The cache must have the query's dtype: k_scale and v_scale are None."""
    plan = part.plan
    flash_attn_varlen_func(
        q=query,
        k=canonicalize_singleton_dim_strides(key_cache),  # TMA wants aligned strides, of single KV heads too
        v=canonicalize_singleton_dim_strides(value_cache),
        out=output,
        cu_seqlens_q=plan.query_start_loc,
        max_seqlen_q=part.max_query_len,
        seqused_k=plan.key_lens,
        max_seqlen_k=plan.page_table.shape[1] * key_cache.shape[1],
        softmax_scale=scale,
        causal=True,
        block_table=plan.page_table,
        softcap=soft_cap,
        fa_version=_version(),
    )


_version = cache(get_flash_attn_version)
