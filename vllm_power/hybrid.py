"""Models in which some layers stay dense: those run vLLM's own backend for the platform, at its full speed.

vLLM picks a backend without knowing the layer. So every layer is built with ours, and those that stay dense change
over when their weights are loaded: the first moment at which an implementation can find its layer, and before vLLM asks
the layers for their KV cache specs, layouts and metadata builders. Dense layers are a KV cache group of their own and
give no block back.
"""

from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_power import kv_cache, options, refusals
from vllm_power.plugin import NAME


class LayerImpl:
    """What our implementations share: they remember how they were built, and step aside in a layer that stays dense.

    Stands before vLLM's AttentionImpl class among an implementation's bases.
    """

    head_size: int
    num_heads: int
    kv_cache_dtype: str

    def remember(self, *arguments: Any, **extra: Any) -> None:
        """Call first in ``__init__``, with its arguments in vLLM's order. Raises ValueError for ALiBi."""
        refusals.check_alibi(arguments[4])
        self.vllm_config = get_current_vllm_config()
        self.arguments, self.extra_arguments = arguments, extra
        kv_cache.configure(self.vllm_config)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)  # type: ignore[misc]
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        for layer in layers:
            if getattr(layer, "impl", None) is self and stays_dense(layer.layer_name, self.vllm_config):
                self._make_dense(layer, act_dtype)

    def _make_dense(self, layer: Any, act_dtype: torch.dtype) -> None:
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
        layer.attn_backend, layer.impl = backend, implementation
        layer.backend = AttentionBackendEnum[backend.get_name()]


def stays_dense(layer_name: str, vllm_config: VllmConfig) -> bool:
    """Whether the layer runs dense attention: the option ``dense_layers`` says so, or it drafts and power was not
    asked for drafting (``--speculative-config '{"attention_backend": "power"}'``)."""
    if drafts(layer_name, vllm_config):
        asked = getattr(vllm_config.speculative_config, "attention_backend", None)
        return asked is None or asked.name != NAME
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    dense = options.of_config(vllm_config).dense_layer_indices(num_layers)
    return extract_layer_index(layer_name) in dense


def drafts(layer_name: str, vllm_config: VllmConfig) -> bool:
    """Whether the layer belongs to a draft model, or to a drafting head: vLLM names these ``mtp.``, or numbers their
    layers on from the model's last."""
    model = vllm_config.model_config
    if model.runner_type == "draft" or layer_name.startswith(("draft_model.", "mtp.")):
        return True
    return extract_layer_index(layer_name) >= model.get_total_num_hidden_layers()
