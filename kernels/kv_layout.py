"""What the attention launchers require of their tensors, and the arguments that the portable kernels share.

The KV cache of a layer is one tensor in vLLM's layout: [pages, G, page_size, 2 * D], each key before its value.
"""

from typing import Any

import torch
import triton

from vllm_power.kernels.plan import Plan


def split_cache(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and the values of a KV cache as views, [pages, page_size, G, D] each."""
    key_cache, value_cache = kv_cache.transpose(1, 2).chunk(2, dim=-1)
    return key_cache, value_cache


def check_tensors(query: torch.Tensor, kv_cache: torch.Tensor, output: torch.Tensor) -> None:
    """Raise ValueError if the shapes or strides of an attention call's tensors do not match."""
    if output.shape != query.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and output {tuple(output.shape)} must have the same shape"
        )
    num_kv_heads, page_size, width = kv_cache.shape[1:]
    if 2 * query.shape[2] != width or query.shape[1] % num_kv_heads:
        raise ValueError(f"query {tuple(query.shape)} does not fit a cache of {tuple(kv_cache.shape)}")
    if query.stride(-1) != 1 or kv_cache.stride(-1) != 1 or output.stride(-1) != 1:
        raise ValueError("the last dimension of query, cache and output must be contiguous")
    if page_size < 16 or page_size & (page_size - 1):
        raise ValueError(f"a page must hold a power of two of at least 16 tokens, not {page_size}")


def kernel_arguments(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    scale: float,
    soft_cap: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> dict[str, Any]:
    """Keyword arguments that the portable prefill and decode kernels share."""
    num_heads, head_size = query.shape[1:]
    num_kv_heads, page_size = kv_cache.shape[1:3]
    return {
        "query": query,
        "kv_cache": kv_cache,
        "output": output,
        "segment_start_loc": plan.segment_start_loc,
        "key_lens": plan.key_lens,
        "segment_pages": plan.segment_pages,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "sinks": sinks,
        "scale": scale,
        "soft_cap": soft_cap,
        "query_strides": query.stride()[:2],
        "cache_strides": kv_cache.stride()[:3],
        "output_strides": output.stride()[:2],
        "segment_pages_stride": plan.segment_pages.stride(0),
        "num_kv_heads": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "SOFT_CAP": bool(soft_cap),
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "PAGE_SIZE": page_size,
    }
