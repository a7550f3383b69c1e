"""What the attention launchers require of their tensors."""

import torch


def check_tensors(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor
) -> None:
    """Raise ValueError where the tensors of an attention call do not fit together."""
    if output.shape != query.shape or key_cache.shape != value_cache.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and output {tuple(output.shape)}, keys {tuple(key_cache.shape)} and values "
            f"{tuple(value_cache.shape)} must be alike"
        )
    if query.shape[2] != key_cache.shape[3] or query.shape[1] % key_cache.shape[2]:
        raise ValueError(f"query {tuple(query.shape)} does not fit a cache of {tuple(key_cache.shape)}")
    if any(tensor.stride(-1) != 1 for tensor in (query, key_cache, value_cache, output)):
        raise ValueError("the last dimension of query, cache and output must be contiguous")
    page_size = key_cache.shape[1]
    if page_size < 16 or page_size & (page_size - 1):
        raise ValueError(f"a page must hold a power of two of at least 16 tokens, not {page_size}")
