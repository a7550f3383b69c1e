"""Forward: write the new keys and values into the cache, run the executor over the step's plan."""

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_power import buffers, refusals
from vllm_power.executors import LayerCall
from vllm_power.hybrid import LayerImpl
from vllm_power.kernels.arguments import split_cache
from vllm_power.metadata import PowerMetadata, executors_of


class PowerImpl(LayerImpl, AttentionImpl[PowerMetadata]):
    """One layer's attention (vllm/v1/attention/backend.py, AttentionImpl)."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.remember(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, **({} if sinks is None else {"sinks": sinks}),
        )  # fmt: skip
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = float(logits_soft_cap or 0.0)
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        refusals.check_sinks(sinks, executors_of(self.vllm_config))
        self.sinks = sinks
        self.buffers: buffers.StepBuffers | None = None
        self.has_reserved = False
        self.is_fp8 = is_quantized_kv_cache(kv_cache_dtype)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: PowerMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step's tokens into ``output``.

        query, output: [tokens, heads, head_size]. kv_cache: [pages, kv_heads, page_size, 2 * head_size], keys first,
        with any strides but the last. key and value are in the cache already (``do_kv_cache_update``).
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("PowerAttention does not quantise its output")
        if attn_metadata is None:  # vLLM's memory profiling
            buffers.reserve(self, output.device)
            return output.fill_(0)
        if self.is_fp8:
            kv_cache = kv_cache.view(current_platform.fp8_dtype())
        tokens = attn_metadata.num_actual_tokens
        call = LayerCall(
            query[:tokens],
            kv_cache,
            output[:tokens],
            self.scale,
            self.soft_cap,
            layer._k_scale if self.is_fp8 else None,
            layer._v_scale if self.is_fp8 else None,
            self.sinks,
        )
        for part in attn_metadata.parts:
            part.attend(part, call)
        return output

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store key and value [tokens, kv_heads, head_size] where ``slot_mapping`` says; slots of -1 are skipped."""
        from vllm._custom_ops import reshape_and_cache_flash

        key_cache, value_cache = split_cache(kv_cache)
        scales: tuple[Any, Any] = (layer._k_scale, layer._v_scale)
        reshape_and_cache_flash(
            key, value, key_cache, value_cache, slot_mapping, self.kv_cache_dtype, *scales
        )
