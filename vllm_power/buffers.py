"""Device memory that steps use in addition to the KV cache: the plans' buffers and the decode kernel's workspace.

vLLM sizes its KV cache by the memory that is left after its memory profiling. Profiling runs every layer without
metadata, and the buffers of the first metadata builder are created at that moment, so that they are counted. If the
layers form several KV cache groups, the buffers of the others are not counted: under 1 MiB each with pages of 256.
"""

import weakref

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import max_decode_query_len

from vllm_power import options, refusals
from vllm_power.kernels import decode
from vllm_power.kernels.plan import VisibleBlocks
from vllm_power.kernels.plan_gpu import PlanBuilder


class StepBuffers:
    """The buffers that the steps of one KV cache group use.

    decode_len: requests with up to this many new tokens decode; requests with more prefill. decodes, prefills: the
    buffers of their plans. prompt_lens: int32 [max_num_seqs]. workspace: float32, for the decode kernel's splits.
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
        asked = options.of_config(vllm_config)
        visible = VisibleBlocks.of(asked.effective_pattern, vllm_config.model_config.max_model_len, device)
        most = scheduler.max_num_seqs
        self.decodes = PlanBuilder(visible, page_size, most, most * self.decode_len, asked.rows)
        self.prefills = PlanBuilder(visible, page_size, most, scheduler.max_num_batched_tokens)
        self.prompt_lens = torch.zeros(most, dtype=torch.int32, device=device)
        size = decode.workspace_size(num_heads, num_kv_heads, head_size, self.decode_len, device)
        self.workspace = torch.empty(size, dtype=torch.float32, device=device)

    @property
    def num_bytes(self) -> int:
        """The device memory of all buffers."""
        return sum(
            part.nbytes if isinstance(part, torch.Tensor) else part.num_bytes
            for part in (self.decodes, self.prefills, self.prompt_lens, self.workspace)
        )


# The buffers made while vLLM profiles memory, by the id of the engine's configuration (configurations are not
# hashable). None: the first builder has taken them.
_reserved: dict[int, StepBuffers | None] = {}


def reserve(
    vllm_config: VllmConfig, num_heads: int, num_kv_heads: int, head_size: int, device: torch.device
) -> None:
    """Make the buffers of a model once, while vLLM profiles memory, for the shape of the first layer that runs.

    vLLM also runs layers without metadata later, after the first builder has taken the buffers: then this does nothing.
    """
    if id(vllm_config) not in _reserved:
        page_size = refusals.kernel_page(vllm_config, on_cpu=False)
        weakref.finalize(vllm_config, _reserved.pop, id(vllm_config), None)
        _reserved[id(vllm_config)] = StepBuffers(
            vllm_config, num_heads, num_kv_heads, head_size, page_size, device
        )


def take(
    vllm_config: VllmConfig,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    page_size: int,
    device: torch.device,
) -> StepBuffers:
    """The reserved buffers if they fit and no builder has taken them, otherwise new ones."""
    reserved = _reserved.get(id(vllm_config))
    if reserved is not None:
        _reserved[id(vllm_config)] = None
    if reserved is not None and reserved.shape == (num_heads, num_kv_heads, head_size, page_size):
        return reserved
    return StepBuffers(vllm_config, num_heads, num_kv_heads, head_size, page_size, device)
