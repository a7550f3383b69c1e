"""Attention of whole texts under a pattern, forward: one program per query tile and head.

A query tile reads the key tiles that its list names. For most of them, every query sees all keys, so that no mask is
computed: only the tile's own keys are causal, and only tiles larger than a block, or with some rows that see
everything, need another mask.
"""

import torch
import triton
import triton.language as tl

from vllm_power.kernels.training_tiles import (
    LOG2_E,
    NO_MAXIMUM,
    NOTHING,
    PADDING,
    WORDS,
    load_text,
    load_tokens,
    sees,
    store_tokens,
)


@triton.jit
def _attend(
    query_tile, accumulator, row_max, row_sum, key, value, row, start, first_key, length, kv_head,
    key_strides, value_strides, scale, positions, dense, bits,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over BLOCK_N keys: the new accumulator, row_max and row_sum."""
    keys = first_key + tl.arange(0, BLOCK_N)
    some = keys < length if CAUSAL else None  # another text follows the end of this one
    # [BLOCK_N, HEAD_PAD]
    key_tile = load_tokens(key, row, start + first_key, kv_head, key_strides, some, BLOCK_N, HEAD, HEAD_PAD)
    scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * scale
    if MASK:
        seen = sees(positions[:, None], keys[None, :], dense[:, None], bits, CAUSAL, TILE, PARTS)
        scores = tl.where(seen, scores, float("-inf"))
    new_row_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_row_max[:, None])
    rescale = tl.exp2(row_max - new_row_max)
    row_sum = row_sum * rescale + tl.sum(weights, 1)
    # [BLOCK_N, VALUE_PAD]
    value_tile = load_tokens(
        value, row, start + first_key, kv_head, value_strides, some, BLOCK_N, VALUE, VALUE_PAD
    )
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)
    return accumulator, new_row_max, row_sum


@triton.jit(do_not_specialize=["shift"])
def _forward_kernel(
    query, key, value, output, log_sums, tiles, entries,
    query_strides, key_strides, value_strides, output_strides, log_sums_strides, scale, shift,
    GROUP: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # Heads that share keys run next to each other.
    head = tl.program_id(0)
    record = tiles + tl.program_id(1) * WORDS
    kind = tl.load(record)
    if kind == NOTHING:
        return
    row, start, length, number, dense_from, dense_to = load_text(record)
    kv_head = head // GROUP

    # [TILE]
    positions = number * TILE + tl.arange(0, TILE)
    token = start + number * TILE - shift
    exists = (positions < length) & (positions + start >= shift)
    if kind == PADDING:
        zeros = tl.zeros([TILE, VALUE_PAD], tl.float32)
        store_tokens(output, row, token, head, output_strides, exists, zeros, TILE, VALUE, VALUE_PAD)
        return
    whole = tl.load(record + 7)
    num_whole = tl.load(record + 8)
    partial = tl.load(record + 9)
    num_partial = tl.load(record + 10)
    own_bits = tl.load(record + 11)
    dense = (positions >= dense_from) & (positions < dense_to)

    # [TILE, HEAD_PAD]
    query_tile = load_tokens(query, row, token, head, query_strides, exists, TILE, HEAD, HEAD_PAD)
    scale *= LOG2_E
    accumulator = tl.zeros([TILE, VALUE_PAD], tl.float32)
    row_max = tl.full([TILE], NO_MAXIMUM, tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    PER_TILE: tl.constexpr = TILE // BLOCK_N
    for step in range(0, num_whole * PER_TILE):
        key_tile_number = tl.load(entries + (whole + step // PER_TILE) * 2)
        first_key = key_tile_number * TILE + step % PER_TILE * BLOCK_N
        accumulator, row_max, row_sum = _attend(
            query_tile, accumulator, row_max, row_sum, key, value, row, start, first_key, length, kv_head,
            key_strides, value_strides, scale, positions, dense, 0,
            False, False, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_N,
        )  # fmt: skip
    if PARTIAL:
        for step in range(0, num_partial * PER_TILE):
            entry = entries + (partial + step // PER_TILE) * 2
            first_key = tl.load(entry) * TILE + step % PER_TILE * BLOCK_N
            accumulator, row_max, row_sum = _attend(
                query_tile, accumulator, row_max, row_sum, key, value, row, start, first_key, length, kv_head,
                key_strides, value_strides, scale, positions, dense, tl.load(entry + 1),
                True, False, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_N,
            )  # fmt: skip
    for step in range(0, PER_TILE):
        accumulator, row_max, row_sum = _attend(
            query_tile, accumulator, row_max, row_sum, key, value, row, start, number * TILE + step * BLOCK_N, length,
            kv_head, key_strides, value_strides, scale, positions, dense, own_bits,
            True, True, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_N,
        )  # fmt: skip
    attended = accumulator / row_sum[:, None]
    store_tokens(output, row, token, head, output_strides, exists, attended, TILE, VALUE, VALUE_PAD)
    log_sums += row.to(tl.int64) * log_sums_strides[0] + head * log_sums_strides[1] + token
    tl.store(log_sums + tl.arange(0, TILE), row_max + tl.log2(row_sum), mask=exists)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    tiles: torch.Tensor,
    entries: torch.Tensor,
    scale: float,
    tile: int,
    parts: int,
    partial: bool,
    launch: dict[str, int],
) -> None:
    """Write the attention of every token that ``tiles`` covers.

    query: [rows, Q, H, D], the last Q of K tokens; key: [rows, K, G, D]; value and output: [rows, K or Q, G or H, Dv],
    each with a contiguous last dimension. log_sums: float32 [rows, H, Q], the base-2 logarithm of the
    softmax's sum. tiles, entries, tile, parts and partial: of a vllm_power.hf.tiles.Lists.
    launch: BLOCK_N (keys per step, a divisor of the tile), num_warps and num_stages.
    """
    heads, head = query.shape[2:]
    width = value.shape[3]
    pads = triton.next_power_of_2(head), triton.next_power_of_2(width)
    _forward_kernel[(heads, len(tiles))](
        query=query,
        key=key,
        value=value,
        output=output,
        log_sums=log_sums,
        tiles=tiles,
        entries=entries,
        query_strides=query.stride()[:3],
        key_strides=key.stride()[:3],
        value_strides=value.stride()[:3],
        output_strides=output.stride()[:3],
        log_sums_strides=log_sums.stride()[:2],
        scale=scale,
        shift=key.shape[1] - query.shape[1],
        GROUP=heads // key.shape[2],
        PARTIAL=partial,
        PRECISION="ieee",
        HEAD=head,
        HEAD_PAD=pads[0],
        VALUE=width,
        VALUE_PAD=pads[1],
        TILE=tile,
        PARTS=parts,
        **launch,
    )
