"""Attention under the pattern by FlexAttention's compiled kernels, forward and backward: for GPUs."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from vllm_power.hf.masks import Aligned


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    texts: Aligned,
    scale: float,
    kernel: Callable[..., Any] | None = None,
) -> torch.Tensor:
    """Attention of rows that have the same texts. Tensors and result as in ``segments.attend``.

    kernel: what to call in place of the compiled FlexAttention.
    """
    kernel = kernel or (flex_attention if torch.compiler.is_compiling() else compiled())
    moves, num_queries = texts.moves, query.shape[2]
    if moves is not None:
        query = query.index_select(2, moves.queries)
        key, value = key.index_select(2, moves.keys), value.index_select(2, moves.keys)
    grouped = query.shape[1] != key.shape[1]
    output = kernel(query, key, value, block_mask=texts.block_mask, scale=scale, enable_gqa=grouped)
    if moves is None:
        return output
    output = output.index_select(2, moves.places)
    if output.shape[2] == num_queries:
        return output
    everywhere = output.new_zeros(*output.shape[:2], num_queries, output.shape[3])
    return everywhere.index_copy(2, moves.where, output)


@cache
def compiled() -> Callable[..., Any]:
    """FlexAttention's kernels; without compiling, it computes every pair of tokens."""
    return torch.compile(flex_attention)
