"""Executors: each runs ordinary causal paged attention over the same plan, on its own kernels."""

from dataclasses import dataclass

import torch

from vllm_power.kernels.plan import Plan


@dataclass
class Part:
    """The requests of a step that go through one kernel.

    max_query_len: the most query tokens a segment can have. workspace: float32, for a decode kernel's pieces.
    """

    plan: Plan
    max_query_len: int
    is_decode: bool
    workspace: torch.Tensor


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
    """Write the attention of the part's tokens into ``output``, on our Triton kernels.

    query, output: [T, H, D]. key_cache, value_cache: [pages, page_size, G, D]. The rest as in ``kernels.prefill``.
    """
    from vllm_power.kernels.decode import decode
    from vllm_power.kernels.prefill import prefill

    if part.is_decode:
        decode(
            query, key_cache, value_cache, output, part.plan, scale, soft_cap, k_scale, v_scale,
            max_query_len=part.max_query_len, workspace=part.workspace,
        )  # fmt: skip
    else:
        prefill(
            query, key_cache, value_cache, output, part.plan, scale, soft_cap, k_scale, v_scale,
            max_query_len=part.max_query_len,
        )  # fmt: skip
