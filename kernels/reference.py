"""The oracle: attention under Algorithm 1 as an explicit mask, in float32 or float64.

Slow and simple; no kernel imports it.
"""

import torch

from vllm_power.pattern import PATTERN_ROWS, Pattern, RowRule


def visibility_mask(
    pattern: Pattern,
    query_positions: torch.Tensor,
    num_keys: int,
    rule: RowRule = PATTERN_ROWS,
    prompt_tokens: int = 0,
) -> torch.Tensor:
    """bool [Q, num_keys]: which key positions each query position sees. query_positions: int [Q].

    rule, prompt_tokens: which rows see everything, in a request of ``prompt_tokens`` prompt tokens.
    """
    blocks = max(pattern.num_blocks(num_keys), int(query_positions.max()) // pattern.block_size + 1)
    pairs = torch.tensor([[pattern.sees(q, k) for k in range(blocks)] for q in range(blocks)])
    positions, keys = query_positions.cpu(), torch.arange(num_keys)
    seen = pairs[positions[:, None] // pattern.block_size, keys[None, :] // pattern.block_size]
    dense = torch.tensor([rule.sees_everything(p, prompt_tokens) for p in positions.tolist()])
    return ((seen | dense[:, None]) & (keys[None, :] <= positions[:, None])).to(query_positions.device)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute masked attention of one request in the dtype of its inputs (pass float32 or float64).

    query: [Q, H, D]; key: [K, G, D]; value: [K, G, Dv], with G dividing H; mask: bool [Q, K]. Returns [Q, H, Dv].
    sinks: [H], a score in each head's softmax that belongs to no key (attention sinks), or None.
    Keys and values that no query sees may hold anything, including NaN.
    """
    group = query.shape[1] // key.shape[1]
    seen = mask.any(0)
    mask = mask[:, seen]
    key = key[seen].repeat_interleave(group, dim=1)
    value = value[seen].repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : key.shape[0]]
    return torch.einsum("hqk,khd->qhd", weights, value)
