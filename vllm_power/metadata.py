"""The step's plan, in vLLM's metadata builder: made once a step, used by every layer.

A batch has up to two parts: requests that decode (one new token each, or a few drafts), which lead it, and requests
that prefill. Each gets a plan in buffers of its own, which stay where they are, so that CUDA graphs stay valid; no
length is read back from the device.
"""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers, split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, is_quantized_kv_cache

from vllm_power import buffers, executors, options, refusals
from vllm_power.executors import Part
from vllm_power.warmup import warm_up


@dataclass
class PowerMetadata:
    """A step: its parts, and how many of its tokens are real (or padding that a CUDA graph brought)."""

    num_actual_tokens: int
    parts: tuple[Part, ...]


class PowerMetadataBuilder(AttentionMetadataBuilder[PowerMetadata]):
    """Builds plans on the GPU (vllm/v1/attention/backend.py, AttentionMetadataBuilder)."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        model = vllm_config.model_config
        num_heads = get_num_attention_heads_from_layers(
            vllm_config, layer_names
        ) or model.get_num_attention_heads(vllm_config.parallel_config)
        page_size = kv_cache_spec.block_size
        self.buffers = buffers.take(
            vllm_config,
            layer_names,
            num_heads,
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            page_size,
            device,
        )
        self.decode_len = self.buffers.decode_len
        self.block_size = options.of_config(vllm_config).effective_pattern.block_size
        choice = executors_of(vllm_config)
        self.prefill_attend, self.decode_attend = (
            executors.load(choice.prefill),
            executors.load(choice.decode),
        )
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.pages_of_a_request = -(-model.max_model_len // page_size)
        self.warmed_up = device.type == "cpu"  # nothing is compiled there

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        choice = executors_of(vllm_config)
        if "reference" in (choice.prefill, choice.decode):
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PowerMetadata:
        step = common_attn_metadata
        refusals.check_causal(step)
        num_decodes, num_prefills, decode_tokens, prefill_tokens = split_decodes_and_prefills(
            step, self.decode_len
        )
        if not self.warmed_up:
            self.warmed_up = True
            warm_up(self)
        parts = []
        if num_decodes:
            rows = slice(0, num_decodes)
            parts.append(self.part(*requests(step, rows), decode_tokens, step.max_query_len, True))
        if num_prefills:
            rows = slice(num_decodes, step.num_reqs)
            part = self.part(
                *requests(step, rows), prefill_tokens, step.max_query_len, False, first=decode_tokens
            )
            parts.append(part)
        return PowerMetadata(step.num_actual_tokens, tuple(parts))

    def part(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        page_table: torch.Tensor,
        num_tokens: int,
        max_query_len: int,
        is_decode: bool,
        first: int = 0,
    ) -> Part:
        """The part of a step that these requests are; the tensors and bounds are those of ``PlanBuilder.build``.

        first: the number of the step's tokens before theirs.
        """
        if is_decode:
            builder, attend = self.buffers.decodes, self.decode_attend
        else:
            builder, attend = self.buffers.prefills, self.prefill_attend
        max_query_len = min(max_query_len, self.decode_len) if is_decode else max_query_len
        plan = builder.build(query_start_loc, seq_lens, page_table, num_tokens, max_query_len)
        return Part(
            plan=plan,
            end=first + num_tokens,
            max_query_len=min(max_query_len, self.block_size),
            is_decode=is_decode,
            workspace=self.buffers.workspace,
            attend=attend,
        )


def requests(step: CommonAttentionMetadata, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query_start_loc [R + 1], seq_lens [R] and page table [R, P] of some requests of a step."""
    starts = step.query_start_loc[rows.start : rows.stop + 1]
    return starts, step.seq_lens[rows], step.block_table_tensor[rows]


def executors_of(vllm_config: VllmConfig) -> executors.Choice:
    """The executors of this engine on this GPU."""
    capability = current_platform.get_device_capability()
    return executors.choose(
        options.of_config(vllm_config).executor,
        tuple(capability) if capability else None,
        is_quantized_kv_cache(vllm_config.cache_config.cache_dtype),
    )
