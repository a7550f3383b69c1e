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
    key_strides,
    value_strides,
    key_cache_strides,
    value_cache_strides,
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
    key_from = token * key_strides[0] + head * key_strides[1]
    value_from = token * value_strides[0] + head * value_strides[1]
    key_to = page * key_cache_strides[0] + in_page * key_cache_strides[1] + head * key_cache_strides[2]
    value_to = (
        page * value_cache_strides[0] + in_page * value_cache_strides[1] + head * value_cache_strides[2]
    )
    keys = tl.load(key + key_from[:, None] + columns, mask=exists)
    values = tl.load(value + value_from[:, None] + columns, mask=exists)
    tl.store(key_cache + key_to[:, None] + columns, keys, mask=exists)
    tl.store(value_cache + value_to[:, None] + columns, values, mask=exists)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Store each token's keys and values in the slot that is its own; tokens with slot -1 are skipped.

    key, value: [T or more, H_kv, D]. key_cache, value_cache: [pages, page_size, H_kv, D], any strides but the last, of
    the same dtype. slot_mapping: int64 [T], page * page_size + place in the page, as vLLM gives it. Raises ValueError
    where they do not fit together.
    """
    page_size, num_kv_heads, head_size = key_cache.shape[1:]
    if key.shape != value.shape or key.shape[1:] != (num_kv_heads, head_size):
        raise ValueError(
            f"keys {tuple(key.shape)} and values {tuple(value.shape)} do not fit a cache of {tuple(key_cache.shape)}"
        )
    if not key.dtype == value.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(f"a cache of {key_cache.dtype} cannot take {key.dtype} as it is")
    if any(tensor.stride(-1) != 1 for tensor in (key, value, key_cache, value_cache)):
        raise ValueError("the last dimension of keys, values and caches must be contiguous")
    num_tokens = len(slot_mapping)
    if num_tokens > len(key):
        raise ValueError(f"slots for {len(key)} tokens, not {num_tokens}, are wanted")
    head_pad = triton.next_power_of_2(head_size)
    rows = ELEMENTS // head_pad
    _write_kernel[(triton.cdiv(num_tokens * num_kv_heads, rows),)](
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        key_strides=key.stride()[:2],
        value_strides=value.stride()[:2],
        key_cache_strides=key_cache.stride()[:3],
        value_cache_strides=value_cache.stride()[:3],
        num_tokens=num_tokens,
        NUM_KV_HEADS=num_kv_heads,
        PAGE_SIZE=page_size,
        HEAD_SIZE=head_size,
        HEAD_PAD=head_pad,
        ROWS=rows,
        num_warps=4,
    )
