"""Keys and values in the paged cache: each in the slot that is its own, and nothing else touched."""

import pytest
import torch
from harness import BFLOAT16, in_vllm_layout
from vllm_power.kernels.cache_write import write_cache

NUM_PAGES = 5


def check(num_tokens: int, page_size: int, kv_heads: int, head_size: int, dtype: torch.dtype, device) -> None:
    """Tokens in random slots, every third without one; the last token is padding. Values are a slice of the projection,
    keys not, as in a model that normalises its keys."""
    generator = torch.Generator().manual_seed(num_tokens)
    rows = torch.randn(num_tokens + 1, 3, kv_heads, head_size, generator=generator).to(device, dtype)
    key, value = rows[:, 1].contiguous(), rows[:, 2]
    slots = torch.randperm(NUM_PAGES * page_size, generator=generator)[:num_tokens]
    slots[2::3] = -1
    untouched = torch.full(
        (NUM_PAGES, page_size, kv_heads, head_size), float("nan"), dtype=dtype, device=device
    )
    caches = in_vllm_layout(untouched, untouched)
    write_cache(key, value, *caches, slots.to(device))
    for cache, written in zip(caches, (key, value), strict=True):
        expected = untouched.clone().flatten(0, 1)
        expected[slots[slots >= 0].to(device)] = written[:num_tokens][slots.to(device) >= 0]
        assert torch.equal(cache.flatten(0, 1).nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 64, 77])
def test_numbers_of_tokens(num_tokens: int, device: torch.device) -> None:
    check(num_tokens, 16, 4, 128, BFLOAT16, device)


@pytest.mark.parametrize("page_size", [16, 64, 256], ids="page-{}".format)
def test_page_sizes(page_size: int, device: torch.device) -> None:
    check(70, page_size, 2, 64, BFLOAT16, device)


@pytest.mark.parametrize("kv_heads", [1, 3, 8], ids="heads-{}".format)
@pytest.mark.parametrize("head_size", [64, 80, 96, 192, 256], ids="head-{}".format)
def test_heads(kv_heads: int, head_size: int, device: torch.device) -> None:
    check(33, 32, kv_heads, head_size, torch.float16, device)


def test_float32(device: torch.device) -> None:
    check(33, 16, 2, 64, torch.float32, device)


def test_what_does_not_fit_is_refused() -> None:
    tokens, cache = torch.zeros(3, 2, 16), torch.zeros(4, 16, 2, 16)
    slots = torch.arange(3)
    with pytest.raises(ValueError, match="do not fit a cache"):
        write_cache(tokens[:, :1], tokens[:, :1], cache, cache, slots)
    with pytest.raises(ValueError, match="cannot take"):
        write_cache(tokens, tokens, cache.half(), cache.half(), slots)
    with pytest.raises(ValueError, match="contiguous"):
        write_cache(tokens, tokens, cache.mT.contiguous().mT, cache.mT.contiguous().mT, slots)
    with pytest.raises(ValueError, match="same strides"):
        write_cache(tokens, tokens, cache, cache.transpose(1, 2).contiguous().transpose(1, 2), slots)
    with pytest.raises(ValueError, match="for 3 tokens, not 4"):
        write_cache(tokens, tokens, cache, cache, torch.arange(4))
