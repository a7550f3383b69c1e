"""Executors: each runs ordinary causal paged attention over a plan's segments, with its own kernels.

``triton`` runs our kernels, ``flash_attn`` is vLLM's FlashAttention (vllm/vllm_flash_attn/flash_attn_interface.py),
``reference`` is the oracle's formula. The CPU needs no executor: vLLM's own backend runs its plan.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from vllm_power.kernels.decode import decode
from vllm_power.kernels.kv_layout import split_cache
from vllm_power.kernels.plan import Plan
from vllm_power.kernels.prefill import prefill
from vllm_power.kernels.reference import attention


@dataclass
class LayerCall:
    """One layer's attention in one step.

    query, output: [T, H, D]. kv_cache: [pages, G, page_size, 2 * D], keys before values, any strides but the last.
    k_scale, v_scale: float32 scalars on the device, the factors of an fp8 cache; None if it is not fp8.
    sinks: [H], the model's attention sinks; None if it has none.
    """

    query: torch.Tensor
    kv_cache: torch.Tensor
    output: torch.Tensor
    scale: float
    soft_cap: float
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    sinks: torch.Tensor | None


@dataclass
class Part:
    """The segments of a step that one kernel runs.

    rows: the step's tokens that the plan's query indices refer to, as a slice or as indices.
    max_query_len: the maximum number of query tokens in a segment.
    executor: one of ``EXECUTORS``. workspace: float32, for the decode kernel's splits. schedule: the plan's
    ahead-of-time schedule for FlashAttention 3, or None. num_splits: FlashAttention's bound on splits, 0 for its own
    choice.
    """

    plan: Plan
    rows: slice | torch.Tensor
    max_query_len: int
    is_decode: bool
    executor: str
    workspace: torch.Tensor
    schedule: torch.Tensor | None = None
    num_splits: int = 0


@dataclass
class PowerMetadata:
    """A step: its parts, and the number of its tokens (padding for a CUDA graph may be among them).

    The parts run in order: the dense rows of prompts come after the part that computes them under the pattern.
    """

    num_actual_tokens: int
    parts: tuple[Part, ...]


def attend(part: Part, layer: LayerCall) -> None:
    """Write the attention of the part's rows into the layer's output."""
    rows, output = part.rows, layer.output
    if (
        isinstance(rows, slice) and rows.stop - rows.start == output.shape[0]
    ):  # the usual case, kept short because it costs host time
        EXECUTORS[part.executor](part, layer)
        return
    own = replace(layer, query=layer.query[rows], output=output[rows])
    EXECUTORS[part.executor](part, own)
    if not isinstance(rows, slice):
        output[rows] = own.output


def triton(part: Part, layer: LayerCall) -> None:
    """Our own kernels."""
    kernel, settings = (decode, {"workspace": part.workspace}) if part.is_decode else (prefill, {})
    kernel(
        query=layer.query,
        kv_cache=layer.kv_cache,
        output=layer.output,
        plan=part.plan,
        scale=layer.scale,
        soft_cap=layer.soft_cap,
        k_scale=layer.k_scale,
        v_scale=layer.v_scale,
        sinks=layer.sinks,
        max_query_len=part.max_query_len,
        **settings,
    )


def flash_attn(part: Part, layer: LayerCall) -> None:
    """vLLM's FlashAttention. The cache must have the query's dtype: ``k_scale`` and ``v_scale`` are None."""
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    plan = part.plan
    # TMA requires aligned strides, also for a single KV head.
    key_cache, value_cache = map(canonicalize_singleton_dim_strides, split_cache(layer.kv_cache))
    flash_attn_varlen_func(
        q=layer.query,
        k=key_cache,
        v=value_cache,
        out=layer.output,
        cu_seqlens_q=plan.segment_start_loc,
        max_seqlen_q=part.max_query_len,
        seqused_k=plan.key_lens,
        max_seqlen_k=plan.segment_pages.shape[1] * key_cache.shape[1],
        softmax_scale=layer.scale,
        causal=True,
        block_table=plan.segment_pages,
        softcap=layer.soft_cap,
        s_aux=layer.sinks,
        scheduler_metadata=part.schedule,
        num_splits=part.num_splits,
        fa_version=flash_attn_version(),
    )


def reference(part: Part, layer: LayerCall) -> None:
    """The oracle's formula, segment by segment in float32. Slow: it serves to tell kernel bugs from plan bugs.

    It reads the plan back to the host, so no CUDA graph can contain it.
    """
    plan, page_size = part.plan, layer.kv_cache.shape[2]
    key_cache, value_cache = split_cache(layer.kv_cache)
    starts, lengths = plan.segment_start_loc.tolist(), plan.key_lens.tolist()
    for segment, num_keys in enumerate(lengths):
        start, end = starts[segment : segment + 2]
        if start == end:
            continue
        pages = plan.segment_pages[segment, : -(-num_keys // page_size)].long()
        key, value = (
            cache[pages].flatten(0, 1)[:num_keys].float() * (1.0 if scale is None else scale)
            for cache, scale in ((key_cache, layer.k_scale), (value_cache, layer.v_scale))
        )
        positions = torch.arange(num_keys, device=key.device)
        mask = positions <= positions[num_keys - (end - start) :, None]
        query = layer.query[start:end].float()
        attended = attention(query, key, value, mask, layer.scale, layer.soft_cap, layer.sinks)
        layer.output[start:end] = attended.to(layer.output.dtype)


EXECUTORS: dict[str, Callable[[Part, LayerCall], None]] = {
    "triton": triton,
    "flash_attn": flash_attn,
    "reference": reference,
}
# What "auto" uses for rows that see the pattern: on an H200 it is faster than FlashAttention over the same plan, in
# prefill and in decode (docs/results/kernels.jsonl), and it runs on every GPU.
AUTO = "triton"


@cache
def flash_attn_version() -> int | None:
    """The FlashAttention version that vLLM uses on this device; None if there is none."""
    from vllm.v1.attention.backends.fa_utils import (
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    return get_flash_attn_version() if is_flash_attn_varlen_func_available() else None


def choose(asked: str, is_fp8: bool, dtype: torch.dtype, head_size: int) -> tuple[str, str]:
    """The executors for rows that see the pattern and for rows that see everything.

    asked: the option ``executor``. With "auto", dense rows use FlashAttention 3, as a server without the pattern would,
    if vLLM has it on this device and it supports the cache; otherwise they use the executor of the other rows.
    """
    sparse = AUTO if asked == "auto" else asked
    takes = not is_fp8 and dtype != torch.float32 and head_size <= 256 and flash_attn_version() == 3
    return sparse, "flash_attn" if asked == "auto" and takes else sparse


class FlashSchedule:
    """FlashAttention 3's ahead-of-time schedules for decode, made once per step instead of in each layer.

    This follows vLLM's own builder (v1/attention/backends/flash_attn.py, ``_get_scheduler_metadata``): with CUDA graphs
    the schedule stays in one buffer, and the number of splits is bounded.
    """

    def __init__(self, vllm_config: Any, kv_cache_spec: Any, num_heads: int, device: torch.device) -> None:
        compilation = vllm_config.compilation_config
        self.spec, self.num_heads = kv_cache_spec, num_heads
        self.graph_tokens = 0
        if compilation.cudagraph_mode.has_full_cudagraphs():
            self.graph_tokens = compilation.max_cudagraph_capture_size or 0
        self.max_splits = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        most = max(vllm_config.scheduler_config.max_num_seqs, self.graph_tokens)
        # One counter, and four numbers per segment, with the number of segments rounded up to a multiple of four.
        self.buffer = torch.zeros(1 + -(-most // 4) * 16, dtype=torch.int32, device=device)

    def add_to(self, part: Part, num_tokens: int, max_seq_len: int) -> None:
        """Add the schedule to ``part``, which has ``num_tokens`` tokens. max_seq_len: the most keys of a segment."""
        from vllm.v1.attention.backends.fa_utils import get_scheduler_metadata

        plan, in_graph = part.plan, num_tokens <= self.graph_tokens
        part.num_splits = self.max_splits if in_graph else 0
        schedule = get_scheduler_metadata(
            batch_size=plan.capacity,
            max_seqlen_q=part.max_query_len,
            max_seqlen_k=max_seq_len,
            num_heads_q=self.num_heads,
            num_heads_kv=self.spec.num_kv_heads,
            headdim=self.spec.head_size,
            cache_seqlens=plan.key_lens,
            qkv_dtype=self.spec.dtype,
            cu_seqlens_q=plan.segment_start_loc,
            page_size=self.spec.block_size,
            causal=True,
            window_size=(-1, -1),
            num_splits=part.num_splits,
        )
        if not in_graph:
            part.schedule = schedule
            return
        used = schedule.shape[0]
        self.buffer[:used] = schedule
        self.buffer[used:] = 0  # stale numbers could be taken for work
        part.schedule = self.buffer[:used]
