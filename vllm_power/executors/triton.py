"""Our own kernels over the plan."""

import torch

from vllm_power.executors import Part
from vllm_power.kernels.decode import decode
from vllm_power.kernels.prefill import prefill


def attend(
    part: Part,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    soft_cap: float,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    """``executors.Attend``."""
    tensors = (query, key_cache, value_cache, output, part.plan, scale, soft_cap, k_scale, v_scale)
    if part.is_decode:
        decode(*tensors, max_query_len=part.max_query_len, workspace=part.workspace)
    else:
        prefill(*tensors, max_query_len=part.max_query_len)
