"""vLLM's own FlashAttention over the plan (vllm/vllm_flash_attn/flash_attn_interface.py)."""

from functools import cache

from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from vllm_power.executors import LayerCall, Part
from vllm_power.kernels.arguments import split_cache


def attend(part: Part, layer: LayerCall) -> None:
    """``executors.Attend``. The cache must have the query's dtype: ``k_scale`` and ``v_scale`` are None."""
    plan = part.plan
    # TMA wants aligned strides, of a single KV head too.
    key_cache, value_cache = map(canonicalize_singleton_dim_strides, split_cache(layer.kv_cache))
    flash_attn_varlen_func(
        # FlashAttention 2 lays out decodes anew by their number: it must not get the tokens after them.
        q=layer.query[: part.end],
        k=key_cache,
        v=value_cache,
        out=layer.output[: part.end],
        cu_seqlens_q=plan.query_start_loc,
        max_seqlen_q=part.max_query_len,
        seqused_k=plan.key_lens,
        max_seqlen_k=plan.page_table.shape[1] * key_cache.shape[1],
        softmax_scale=layer.scale,
        causal=True,
        block_table=plan.page_table,
        softcap=layer.soft_cap,
        s_aux=layer.sinks,
        fa_version=_version(),
    )


_version = cache(get_flash_attn_version)
