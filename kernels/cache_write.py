"""Write a step's keys and values into the paged cache."""

import torch
import triton
import triton.language as tl

# What one program copies of keys, and again of values. Fewer, larger programs leave multiprocessors idle, more and
# smaller ones cost their start: docs/kernels-notes.md.
ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_tokens"])
def _write_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    cache_page_stride,
    cache_slot_stride,
    cache_head_stride,
    num_tokens,
    NUM_KV_HEADS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    # [ROWS]: a row is one head of one token
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = (row // NUM_KV_HEADS).to(tl.int64)
    head = row % NUM_KV_HEADS
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1)
    page = slot // PAGE_SIZE
    in_page = slot % PAGE_SIZE

    # [ROWS, HEAD_PAD]
    columns = tl.arange(0, HEAD_PAD)[None, :]
    exists = (slot >= 0)[:, None] & (columns < HEAD_SIZE)
    key_from = token * key_token_stride + head * key_head_stride
    value_from = token * value_token_stride + head * value_head_stride
    # One for both caches: they are halves of one tensor.
    to = page * cache_page_stride + in_page * cache_slot_stride + head * cache_head_stride
    keys = tl.load(key + key_from[:, None] + columns, mask=exists)
    values = tl.load(value + value_from[:, None] + columns, mask=exists)
    tl.store(key_cache + to[:, None] + columns, keys, mask=exists)
    tl.store(value_cache + to[:, None] + columns, values, mask=exists)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store each token's keys and values in the slot that is its own; tokens with slot -1 are skipped.

    key, value: [T or more, H_kv, D]. key_cache, value_cache: [pages, page_size, H_kv, D] in the dtype of the keys, with
    the same strides. slot_mapping: int64 [T], page * page_size + place in the page, as vLLM gives it. Raises
    ValueError where they do not fit together.
    """
    page_size, num_kv_heads, head_size = key_cache.shape[1:]
    if key.shape != value.shape or key.shape[1:] != (num_kv_heads, head_size):
        raise ValueError(
            f"keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit a cache of {tuple(key_cache.shape)}"
        )
    if not key.dtype == value.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(f"a cache of {key_cache.dtype} cannot take {key.dtype} as it is")
    if key_cache.stride() != value_cache.stride():
        raise ValueError("the caches of keys and values must have the same strides")
    if any(tensor.stride(-1) != 1 for tensor in (key, value, key_cache, value_cache)):
        raise ValueError("the last dimension of keys, values and caches must be contiguous")
    num_tokens = len(slot_mapping)
    if num_tokens > len(key):
        raise ValueError(f"slots for {len(key)} tokens, not {num_tokens}, are wanted")
    head_pad = triton.next_power_of_2(head_size)
    rows = ELEMENTS // head_pad
    # Plain numbers one by one: tuples and names double the host's time for a launch.
    _write_kernel[(triton.cdiv(num_tokens * num_kv_heads, rows),)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        *key.stride()[:2],
        *value.stride()[:2],
        *key_cache.stride()[:3],
        num_tokens,
        num_kv_heads,
        page_size,
        head_size,
        head_pad,
        rows,
        num_warps=4,
    )
