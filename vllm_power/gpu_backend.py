"""PowerAttention over vLLM's paged KV cache on GPUs: backend, metadata builder and layer implementation.

vLLM builds one ``PowerMetadataBuilder`` per KV cache group and calls it once per step; every layer's ``PowerImpl`` then
runs the executors over the step's plans (vllm/v1/attention/backend.py). A kernel builds the plans in buffers with fixed
addresses, so that CUDA graphs stay valid. No length is read back from the device.

Rows that see everything (``pattern.RowRule``): for requests that decode, the plan itself follows the rule, using prompt
lengths on the device. For requests that prefill, the host knows the step's lengths: first all rows see the pattern,
then the dense rows are computed again over the request's whole page table.
"""

from typing import Any, ClassVar

import numpy as np
import torch
from triton import next_power_of_2
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.config.cache import CacheDType
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import get_num_attention_heads_from_layers, split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec, is_quantized_kv_cache

from vllm_power import buffers, executors, options, prompt_lengths, refusals
from vllm_power.executors import LayerCall, Part, PowerMetadata
from vllm_power.hybrid import LayerImpl
from vllm_power.kernels.kv_layout import split_cache
from vllm_power.kernels.plan import Plan
from vllm_power.metrics import writer
from vllm_power.metrics.definitions import LOOKS_AHEAD
from vllm_power.options import NAME
from vllm_power.warmup import warm_up

# One page per block: the fastest for both kernels on an H200 (docs/results/kernels.jsonl; 4 to 10% over pages of 16).
PREFERRED_PAGE = 256


class PowerBackend(AttentionBackend):
    """What the backend can do, as vLLM asks for it (vllm/v1/attention/backend.py, AttentionBackend)."""

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

    @staticmethod
    def get_impl_cls() -> type["PowerImpl"]:
        return PowerImpl

    @staticmethod
    def get_builder_cls() -> type["PowerMetadataBuilder"]:
        return PowerMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [*refusals.GPU_PAGES]

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
        """What runs the plans, for the log line at startup."""
        sparse, dense = executors_of(vllm_config)
        has_dense_rows = options.of_config(vllm_config).rows.has_dense_rows
        return f"{sparse} (dense rows: {dense})" if has_dense_rows and dense != sparse else sparse


class PowerMetadataBuilder(AttentionMetadataBuilder[PowerMetadata]):
    """Builds a step's plans on the GPU (vllm/v1/attention/backend.py, AttentionMetadataBuilder).

    A batch starts with the requests that decode (one new token each, or a few drafts), followed by the requests that
    prefill. Each kind has its own plan in its own buffers. The dense rows of prefills form a separate part.
    """

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
            num_heads,
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            page_size,
            device,
        )
        self.decode_len = self.buffers.decode_len
        asked = options.of_config(vllm_config)
        pattern, self.rows, self.page_size = asked.effective_pattern, asked.rows, page_size
        self.block_size, self.dense_tokens = pattern.block_size, pattern.dense_tokens
        self.sparse, self.dense = executors_of(vllm_config, kv_cache_spec.head_size)
        self.decode_executor = self.dense if self.rows.dense_decode else self.sparse
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs
        self.pages_of_a_request = -(-model.max_model_len // page_size)
        self.schedule = (
            executors.FlashSchedule(vllm_config, kv_cache_spec, num_heads, device)
            if self.decode_executor == "flash_attn" and executors.flash_attn_version() == 3
            else None
        )
        self.warmed_up = device.type == "cpu"  # nothing is compiled there

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        if "reference" in executors_of(vllm_config):
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_BATCH

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PowerMetadata:
        """The plans of a step.

        Raises NotImplementedError for a step that attends to later tokens.
        """
        step = common_attn_metadata
        with writer.counted(LOOKS_AHEAD, self.vllm_config):
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
            lengths = None
            if self.rows.has_dense_rows:
                lengths = prompt_lengths.to_device(step, rows, self.buffers.prompt_lens)
            parts.append(
                self.decode_part(
                    *requests(step, rows), decode_tokens, step.max_query_len, lengths, step.max_seq_len
                )
            )
        if num_prefills:
            rows = slice(num_decodes, step.num_reqs)
            parts.append(
                self.prefill_part(*requests(step, rows), prefill_tokens, step.max_query_len, decode_tokens)
            )
            if self.rows.has_dense_rows:
                runs = prompt_lengths.dense_runs(step, rows, self.rows, self.dense_tokens)
                if runs is not None:
                    parts.append(self.dense_part(runs, step.block_table_tensor))
        return PowerMetadata(step.num_actual_tokens, tuple(parts))

    def decode_part(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        page_table: torch.Tensor,
        num_tokens: int,
        max_query_len: int,
        prompt_lens: torch.Tensor | None = None,
        max_seq_len: int | None = None,
    ) -> Part:
        """The part of the requests that decode. The tensors and bounds are those of ``PlanBuilder.build``."""
        max_query_len = min(max_query_len, self.decode_len)
        plan = self.buffers.decodes.build(
            query_start_loc, seq_lens, page_table, num_tokens, max_query_len, prompt_lens
        )
        part = Part(
            plan, slice(0, num_tokens), max_query_len, True, self.decode_executor, self.buffers.workspace
        )
        if self.schedule is not None:
            self.schedule.add_to(
                part, num_tokens, max_seq_len or plan.segment_pages.shape[1] * self.page_size
            )
        return part

    def prefill_part(
        self,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        page_table: torch.Tensor,
        num_tokens: int,
        max_query_len: int,
        first: int = 0,
    ) -> Part:
        """The part of the requests that prefill, all rows under the pattern. first: number of tokens before them."""
        plan = self.buffers.prefills.build(query_start_loc, seq_lens, page_table, num_tokens, max_query_len)
        longest = min(max_query_len, self.block_size)
        rows = slice(0, first + num_tokens)  # the plan's queries are counted from the step's first token
        return Part(plan, rows, longest, False, self.sparse, self.buffers.workspace)

    def dense_part(self, runs: prompt_lengths.DenseRuns, page_table: torch.Tensor) -> Part:
        """The part of the dense rows of requests that prefill, over each request's own pages."""

        def put(numbers: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(numbers).to(self.device, non_blocking=True)

        starts = np.concatenate([[0], runs.num_rows.cumsum()]).astype(np.int32)
        num_segments = np.array([len(runs.request)], np.int32)
        pages = page_table.index_select(0, put(runs.request))
        plan = Plan(put(starts), put(runs.num_keys), pages, put(num_segments))
        first = int(runs.first_row[0])
        rows: slice | torch.Tensor = slice(first, first + int(starts[-1]))
        if len(runs.request) > 1:
            each = zip(runs.first_row, runs.num_rows, strict=True)
            rows = put(np.concatenate([np.arange(first, first + number) for first, number in each]))
        longest = int(runs.num_rows.max())
        if self.dense == "triton":  # a bound that takes few values: kernels are compiled for it
            longest = next_power_of_2(longest)
        return Part(plan, rows, longest, False, self.dense, self.buffers.workspace)


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
        refusals.check_alibi(alibi_slopes)
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
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name  # vLLM reads it
        refusals.check_sinks(sinks, executors_of(self.vllm_config, head_size))
        self.sinks = sinks
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
            buffers.reserve(
                self.vllm_config, self.num_heads, self.num_kv_heads, self.head_size, output.device
            )
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
            executors.attend(part, call)
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


def requests(step: CommonAttentionMetadata, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query_start_loc [R + 1], seq_lens [R] and page table [R, P] of some requests of a step."""
    starts = step.query_start_loc[rows.start : rows.stop + 1]
    return starts, step.seq_lens[rows], step.block_table_tensor[rows]


def executors_of(vllm_config: VllmConfig, head_size: int | None = None) -> tuple[str, str]:
    """The executors of this engine for rows that see the pattern and for rows that see everything."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    return executors.choose(
        options.of_config(vllm_config).executor,
        is_quantized_kv_cache(cache.cache_dtype),
        model.dtype,
        model.get_head_size() if head_size is None else head_size,
    )
