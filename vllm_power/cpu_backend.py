"""PowerAttention on CPUs: vLLM's own C++ attention (AVX-512, AMX, ...) over the plan.

The kernels take variable-length queries, key lengths and a block table. When they receive the segments of a plan as if
they were requests, they compute exact PowerAttention, and fp8 caches, soft caps and attention sinks keep working. So
only the metadata differs from vLLM's CPU backend (v1/attention/backends/cpu_attn.py); reading and writing the cache is
inherited.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata, MultipleOf
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_power import options, prompt_lengths, refusals
from vllm_power.hybrid import LayerImpl
from vllm_power.kernels.plan import Plan, VisibleBlocks, build_plan
from vllm_power.metrics import writer
from vllm_power.metrics.definitions import LOOKS_AHEAD
from vllm_power.options import NAME


class PowerCpuBackend(CPUAttentionBackend):
    """PowerAttention on a CPU."""

    @classmethod
    def executor_name(cls, vllm_config: VllmConfig) -> str:
        return "cpu"

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == "decoder"

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return False  # such layers use vLLM's CPU backend

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [*refusals.CPU_PAGES]

    @staticmethod
    def get_impl_cls() -> type["PowerCpuImpl"]:
        return PowerCpuImpl

    @staticmethod
    def get_builder_cls() -> type["PowerCpuMetadataBuilder"]:
        return PowerCpuMetadataBuilder


class PowerCpuMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds the step's plan and passes it to vLLM's builder as if its segments were the requests."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        asked = options.of_config(vllm_config)
        self.rows = asked.rows
        self.visible = VisibleBlocks.of(asked.effective_pattern, vllm_config.model_config.max_model_len)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        step = common_attn_metadata
        with writer.counted(LOOKS_AHEAD, self.vllm_config):
            refusals.check_causal(step)
        # If no request is longer than the blocks that see everything, the plan would equal the step itself.
        if step.max_seq_len > self.visible.pattern.dense_tokens:
            starts, lengths, table = step.query_start_loc, step.seq_lens, step.block_table_tensor
            prompts = None
            if self.rows.has_dense_rows:
                told = prompt_lengths.of_step(step, slice(0, step.num_reqs))
                prompts = torch.from_numpy(told).to(lengths.dtype)
            plan = build_plan(
                starts, lengths, table, self.visible, self.block_size, True, self.rows, prompt_lens=prompts
            )
            step = over_plan(step, plan)
        return super().build(common_prefix_len, step, fast_build)


def over_plan(step: CommonAttentionMetadata, plan: Plan) -> CommonAttentionMetadata:
    """The step with the plan's segments instead of its requests; tokens and cache slots are unchanged."""
    return step.replace(
        query_start_loc=plan.segment_start_loc,
        query_start_loc_cpu=plan.segment_start_loc,
        seq_lens=plan.key_lens,
        num_reqs=plan.capacity,
        block_table_tensor=plan.segment_pages,
    )


class PowerCpuImpl(LayerImpl, CPUAttentionBackendImpl):
    """vLLM's CPU attention. Refuses what a rewritten table cannot express, and is replaced in dense layers."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        *arguments: Any,
        **extra: Any,
    ) -> None:
        refusals.check_alibi(alibi_slopes)
        every = (num_heads, head_size, scale, num_kv_heads, alibi_slopes, *arguments)
        self.remember(*every, **extra)
        super().__init__(*every, **extra)
