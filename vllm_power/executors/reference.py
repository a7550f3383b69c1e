"""The oracle's formula over the plan, segment by segment in float32. Slow: to tell a kernel's fault from the plan's."""

import torch

from vllm_power.executors import LayerCall, Part
from vllm_power.kernels.arguments import split_cache
from vllm_power.kernels.reference import attention


def attend(part: Part, layer: LayerCall) -> None:
    """``executors.Attend``. Reads the plan back to the host, so no CUDA graph can hold it."""
    plan, page_size = part.plan, layer.kv_cache.shape[2]
    key_cache, value_cache = split_cache(layer.kv_cache)
    starts, lengths = plan.query_start_loc.tolist(), plan.key_lens.tolist()
    for segment, num_keys in enumerate(lengths):
        start, end = starts[segment : segment + 2]
        if start == end:
            continue
        pages = plan.page_table[segment, : -(-num_keys // page_size)].long()
        key, value = (
            cache[pages].flatten(0, 1)[:num_keys].float() * (1.0 if scale is None else scale)
            for cache, scale in ((key_cache, layer.k_scale), (value_cache, layer.v_scale))
        )
        positions = torch.arange(num_keys, device=key.device)
        mask = positions <= positions[num_keys - (end - start) :, None]
        query = layer.query[start:end].float()
        attended = attention(query, key, value, mask, layer.scale, layer.soft_cap, layer.sinks)
        layer.output[start:end] = attended.to(layer.output.dtype)
