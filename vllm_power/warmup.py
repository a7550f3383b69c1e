"""Compile, before the first request, every variant of the kernels that a request can need.

Triton compiles a kernel at its first launch. So the first metadata build (during vLLM's own warm-up) runs a layer over
dummy steps: prompts of every size class, their dense rows if our kernels compute those, and decode batches of every
size class. No real data is read or written: the dummies see vLLM's null page, and their output is discarded.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_power.executors import Part, PowerMetadata
from vllm_power.prompt_lengths import DenseRuns

if TYPE_CHECKING:
    from vllm_power.gpu_backend import PowerMetadataBuilder


def warm_up(builder: "PowerMetadataBuilder") -> None:
    """Run ``builder``'s first layer over dummy steps, if the layer has its KV cache already."""
    context = builder.vllm_config.compilation_config.static_forward_context
    layer = context.get(builder.layer_names[0]) if builder.layer_names else None
    if layer is None or not layer.kv_cache.numel():
        return
    longest = min(builder.block_size, builder.vllm_config.model_config.max_model_len)
    for tokens in _size_classes(builder.decode_len + 1, longest):
        _attend(builder, layer, requests=1, tokens=tokens, part_of=builder.prefill_part)
    if builder.rows.has_dense_rows and builder.dense == "triton":
        scheduler, model = builder.vllm_config.scheduler_config, builder.vllm_config.model_config
        most = min(scheduler.max_num_batched_tokens, model.max_model_len)
        for tokens in (min(1 << bit, most) for bit in range((most - 1).bit_length() + 1)):
            _attend(builder, layer, requests=1, tokens=tokens, part_of=partial(_dense_part, builder))
    for tokens in range(1, builder.decode_len + 1):
        for requests in _size_classes(1, builder.max_num_reqs):
            _attend(builder, layer, requests, tokens, part_of=builder.decode_part)


def _size_classes(least: int, most: int) -> list[int]:
    """``least``, ``most``, and between them 2, 3, 4, 6, 8, 12, ...: one of each compiled size class."""
    steps = {size << bit for size in (2, 3) for bit in range(most.bit_length())}
    return sorted({min(least, most), *(step for step in steps if least <= step <= most), most})


def _dense_part(
    builder: "PowerMetadataBuilder",
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    page_table: torch.Tensor,
    num_tokens: int,
    max_query_len: int,
) -> Part:
    """The part of one prompt of ``num_tokens`` tokens, all of whose rows see everything."""
    first, number = np.zeros(1, np.int64), np.array([num_tokens])
    return builder.dense_part(DenseRuns(first, first, number, number.astype(np.int32)), page_table)


def _attend(
    builder: "PowerMetadataBuilder", layer: Any, requests: int, tokens: int, part_of: Callable[..., Part]
) -> None:
    """One layer's attention for ``requests`` new requests of ``tokens`` tokens each."""
    device, total = builder.device, requests * tokens
    part = part_of(
        torch.arange(0, total + 1, tokens, dtype=torch.int32, device=device),
        torch.full((requests,), tokens, dtype=torch.int32, device=device),
        torch.zeros(requests, builder.pages_of_a_request, dtype=torch.int32, device=device),
        total,
        tokens,
    )
    query = torch.zeros(total, layer.num_heads, layer.head_size, dtype=layer.dtype, device=device)
    layer.impl.forward(
        layer, query, query, query, layer.kv_cache, PowerMetadata(total, (part,)), torch.empty_like(query)
    )
