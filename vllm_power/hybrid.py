"""Models in which some layers stay dense: these layers run vLLM's own backend for the platform, at full speed.

vLLM picks a backend without knowing the layer. So every layer is built with our backend, and the layers that stay dense
switch to vLLM's when their weights have been loaded. That is the first moment at which an implementation can find its
layer, and it is before vLLM asks the layers for their KV cache specs, layouts and metadata builders. Layers that attend
inside chunks (Llama-4) switch in the same way; vLLM has wrapped the backend that it picked for them. Dense layers form
their own KV cache group, which reclaims no blocks.
"""

from typing import Any

import torch
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers.attention.chunked_local_attention import (
    ChunkedLocalAttention,
    create_chunked_local_attention_backend,
)
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_power import compat, refusals
from vllm_power.layers import stays_dense


class LayerImpl:
    """What our implementations share: they record their arguments, and are replaced in a layer that stays dense.

    This class precedes vLLM's AttentionImpl class among the bases of an implementation.
    """

    head_size: int
    num_heads: int
    kv_cache_dtype: str

    def remember(self, *arguments: Any, **extra: Any) -> None:
        """Record the arguments of ``__init__``, in vLLM's order. Call this first in ``__init__``."""
        self.vllm_config = get_current_vllm_config()
        self.arguments, self.extra_arguments = arguments, extra
        compat.tell_prompt_lengths()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Replace the backend if the layer stays dense. Raises ValueError if the layer's class wraps our backend."""
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        for layer in self.vllm_config.compilation_config.static_forward_context.values():
            if getattr(layer, "impl", None) is not self:
                continue
            if isinstance(layer, ChunkedLocalAttention):
                backend = self._make_dense(layer, act_dtype)
                layer.attn_backend = create_chunked_local_attention_backend(
                    backend, layer.attention_chunk_size
                )
            elif stays_dense(layer.layer_name, self.vllm_config):
                self._make_dense(layer, act_dtype)
            else:
                refusals.check_wrapper(layer)

    def _make_dense(self, layer: Any, act_dtype: torch.dtype) -> type[AttentionBackend]:
        selector = AttentionSelectorConfig(
            head_size=self.head_size,
            dtype=act_dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            block_size=None,
            has_sink=self.extra_arguments.get("sinks") is not None,
        )
        with set_current_vllm_config(self.vllm_config):
            backend = resolve_obj_by_qualname(
                current_platform.get_attn_backend_cls(None, selector, num_heads=self.num_heads)
            )
            implementation = backend.get_impl_cls()(*self.arguments, **self.extra_arguments)
        refusals.check_dense_layer(implementation, self.kv_cache_dtype)
        compat.replace_backend(layer, backend, implementation)
        return backend
