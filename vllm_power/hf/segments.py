"""The exact pattern on any device: each segment is dense attention over the blocks that it sees.

A **segment** is the same as in the server's plan (vllm_power/kernels/plan.py): the new tokens of one text that lie in
one query block. They all see the same earlier blocks as a whole, and their own block causally. Here keys are
contiguous, so the keys of a segment are a few slices. PyTorch itself computes forward and backward.
"""

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from vllm_power.hf.documents import Row
from vllm_power.pattern import Pattern

Range = tuple[int, int]


def segments(pattern: Pattern, first: int, length: int) -> Iterator[tuple[Range, list[Range]]]:
    """(queries, keys) of each segment in the tokens ``first`` to ``length`` of a text; both as positions in the text.

    The leading blocks that see everything before them form one segment.
    """
    size = pattern.block_size
    dense = min(length, pattern.dense_tokens)
    if first < dense:
        yield (first, dense), [(0, dense)]
    first = max(first, dense)
    for block in range(first // size, pattern.num_blocks(length) if first < length else 0):
        start, end = max(first, block * size), min(length, (block + 1) * size)
        keys: list[Range] = []
        for seen in pattern.visible_blocks(block):
            begin = keys.pop()[0] if keys and keys[-1][1] == seen * size else seen * size
            keys.append((begin, min(end, (seen + 1) * size)))
        yield (start, end), keys


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: Pattern,
    documents: Row,
    scale: float,
) -> torch.Tensor:
    """Attention of rows that have the same documents.

    query: [rows, H, Q, D], the last Q of the K tokens; key: [rows, G, K, D]; value: [rows, G, K, Dv], G dividing H.
    Returns [rows, H, Q, Dv], with zeros for padding.
    """
    num_keys = key.shape[2]
    first_query = num_keys - query.shape[2]
    parts = []
    done = first_query

    def padding(until: int) -> torch.Tensor:
        return value.new_zeros(*query.shape[:2], until - done, value.shape[3])

    for start, end in documents:
        for (begin, stop), ranges in segments(pattern, max(0, first_query - start), end - start):
            if start + begin > done:
                parts.append(padding(start + begin))
            done = start + stop
            keys, values = (
                torch.cat([states[:, :, start + low : start + high] for low, high in ranges], dim=2)
                for states in (key, value)
            )
            rows = query[:, :, start + begin - first_query : start + stop - first_query]
            parts.append(causal(rows, keys, values, scale))
    if done < num_keys:
        parts.append(padding(num_keys))
    return torch.cat(parts, dim=2)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention whose last query sees every key."""
    queries, keys = query.shape[2], key.shape[2]
    square = queries == keys
    mask = None
    if not square and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
        if query.is_cuda:  # no fast CUDA kernel takes both a mask and grouped heads
            group = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
