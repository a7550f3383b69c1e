"""What the attention launchers require of their tensors, and what the portable kernels take alike."""

from typing import Any

import torch
import triton
from vllm_power.kernels.plan import Plan


def check_tensors(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
) -> None:
    """Raise ValueError where the tensors of an attention call do not fit together."""
    if output.shape != query.shape or key_cache.shape != value_cache.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and output {tuple(output.shape)}, keys {tuple(key_cache.shape)} and values "
            f"{tuple(value_cache.shape)} must be alike"
        )
    if query.shape[2] != key_cache.shape[3] or query.shape[1] % key_cache.shape[2]:
        raise ValueError(f"query {tuple(query.shape)} does not fit a cache of {tuple(key_cache.shape)}")
    if any(tensor.stride(-1) != 1 for tensor in (query, key_cache, value_cache, output)):
        raise ValueError("the last dimension of query, cache and output must be contiguous")
    page_size = key_cache.shape[1]
    if page_size < 16 or page_size & (page_size - 1):
        raise ValueError(f"a page must hold a power of two of at least 16 tokens, not {page_size}")


def kernel_arguments(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    plan: Plan,
    scale: float,
    soft_cap: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> dict[str, Any]:
    """The arguments that the portable prefill and decode kernels share, by name."""
    num_heads, head_size = query.shape[1:]
    page_size, num_kv_heads = key_cache.shape[1:3]
    return {
        "query": query,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "output": output,
        "query_start_loc": plan.query_start_loc,
        "key_lens": plan.key_lens,
        "page_table": plan.page_table,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "sinks": sinks,
        "scale": scale,
        "soft_cap": soft_cap,
        "query_strides": query.stride()[:2],
        "key_strides": key_cache.stride()[:3],
        "value_strides": value_cache.stride()[:3],
        "output_strides": output.stride()[:2],
        "page_table_stride": plan.page_table.stride(0),
        "num_kv_heads": num_kv_heads,
        "GROUP": num_heads // num_kv_heads,
        "SOFT_CAP": bool(soft_cap),
        "PRECISION": "ieee" if query.dtype == torch.float32 else None,
        "HEAD_SIZE": head_size,
        "HEAD_PAD": triton.next_power_of_2(head_size),
        "PAGE_SIZE": page_size,
    }
