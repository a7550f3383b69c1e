"""The attention backend that vLLM loads for ``--attention-backend power``: what it can do."""

from typing import ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.config.cache import CacheDType
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_power import kv_cache, options
from vllm_power.impl import PowerImpl
from vllm_power.metadata import PowerMetadataBuilder, executors_of
from vllm_power.plugin import NAME

# A page of a whole block: the fastest for both kernels on an H200 (docs/results/kernels.jsonl; 4 to 10 % over 16).
PREFERRED_PAGE = 256


class PowerBackend(AttentionBackend):
    """PowerAttention over vLLM's paged KV cache on GPUs (vllm/v1/attention/backend.py, AttentionBackend)."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return kv_cache.customize_spec(spec)

    @staticmethod
    def get_impl_cls() -> type[PowerImpl]:
        return PowerImpl

    @staticmethod
    def get_builder_cls() -> type[PowerMetadataBuilder]:
        return PowerMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        config = get_current_vllm_config_or_none()
        if config is None:
            return PREFERRED_PAGE
        return min(PREFERRED_PAGE, options.of_config(config).effective_pattern.block_size)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [32, 64, 80, 96, 128, 192, 256]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return capability >= DeviceCapability(8, 0)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def executor_name(cls, vllm_config: VllmConfig) -> str:
        """What runs the plan, for the start-up line."""
        return str(executors_of(vllm_config))
