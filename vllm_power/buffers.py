"""Device memory that the steps use beside the KV cache: the plans' buffers and the decode kernel's workspace.

vLLM fits its KV cache into what its memory profiling leaves. It runs every layer then, without metadata: at that moment
the buffers of the first metadata builder are made already, so that they are counted. Where the layers form several KV
cache groups, those of the others come on top: under 1 MiB each on pages of 256.
"""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import max_decode_query_len

from vllm_power import options
from vllm_power.kernels import decode
from vllm_power.kernels.plan import VisibleBlocks
from vllm_power.kernels.plan_gpu import PlanBuilder


class StepBuffers:
    """What the steps of one KV cache group use.

    decode_len: requests of up to so many new tokens decode; longer ones prefill. decodes, prefills: their plans'
    buffers. workspace: float32, for the decode kernel's pieces.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        self.shape = (num_heads, num_kv_heads, head_size, page_size)
        scheduler = vllm_config.scheduler_config
        rows = decode.MAX_ROWS // (num_heads // num_kv_heads)
        self.decode_len = max(1, min(max_decode_query_len(vllm_config), rows))
        pattern = options.of_config(vllm_config).effective_pattern
        visible = VisibleBlocks.of(pattern, vllm_config.model_config.max_model_len, device)
        most = scheduler.max_num_seqs
        self.decodes = PlanBuilder(visible, page_size, most, most * self.decode_len)
        self.prefills = PlanBuilder(visible, page_size, most, scheduler.max_num_batched_tokens)
        size = decode.workspace_size(num_heads, num_kv_heads, head_size, self.decode_len, device)
        self.workspace = torch.empty(size, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        """Device memory that they take."""
        return self.decodes.num_bytes + self.prefills.num_bytes + self.workspace.nbytes


def reserve(impl: Any, device: torch.device) -> None:
    """While vLLM profiles memory: make the buffers of the model of ``impl``, a layer's implementation, once.

    vLLM runs layers without metadata later too, when the first builder has taken them: then nothing is made.
    """
    layers = impl.vllm_config.compilation_config.static_forward_context.values()
    if any(getattr(getattr(layer, "impl", None), "has_reserved", False) for layer in layers):
        return
    impl.has_reserved = True
    impl.buffers = StepBuffers(
        impl.vllm_config,
        impl.num_heads,
        impl.num_kv_heads,
        impl.head_size,
        impl.vllm_config.cache_config.block_size,
        device,
    )


def take(
    vllm_config: VllmConfig,
    layer_names: Sequence[str],
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
    device: torch.device,
) -> StepBuffers:
    """The buffers that were reserved in one of these layers, where they fit, or new ones."""
    layers = vllm_config.compilation_config.static_forward_context
    impls: list[Any] = [getattr(layers.get(name), "impl", None) for name in layer_names]
    for impl in impls:
        if reserved := getattr(impl, "buffers", None):
            impl.buffers = None
            if reserved.shape == (num_heads, num_kv_heads, head_size, page_size):
                return reserved
    return StepBuffers(vllm_config, num_heads, num_kv_heads, head_size, page_size, device)
