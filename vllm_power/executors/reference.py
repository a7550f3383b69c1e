"""The oracle's formula over the plan, segment by segment in float32. Slow: to tell a kernel's fault from the plan's."""

import torch

from vllm_power.executors import Part
from vllm_power.kernels.reference import attention


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
    """``executors.Attend``. Reads the plan back to the host, so no CUDA graph can hold it."""
    plan, page_size = part.plan, key_cache.shape[1]
    starts, lengths = plan.query_start_loc.tolist(), plan.key_lens.tolist()
    for segment, num_keys in enumerate(lengths):
        start, end = starts[segment : segment + 2]
        if start == end:
            continue
        pages = plan.page_table[segment, : -(-num_keys // page_size)].long()
        key, value = (cache[pages].flatten(0, 1)[:num_keys].float() for cache in (key_cache, value_cache))
        positions = torch.arange(num_keys, device=query.device)
        mask = positions <= positions[num_keys - (end - start) :, None]
        if k_scale is not None and v_scale is not None:
            key, value = key * k_scale, value * v_scale
        attended = attention(query[start:end].float(), key, value, mask, scale, soft_cap)
        output[start:end] = attended.to(output.dtype)
