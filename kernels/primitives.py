"""Small Triton functions that the kernels share: GQA packing, keys in the paged cache, and the online softmax.

Scores are kept in base-2 units (natural units times log2(e)), so that a weight is one ``exp2``.

The soft cap (``base2_scores``) and the softmax (``online_softmax``) stand a second time in ``prefill_sm90_consumer``:
Triton and Gluon cannot share functions that compute on tensors. A change of one must be made in both.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# row_max of a row that has seen no key yet. Finite, so that a tile without a visible key gives zeros and not NaN.
NO_MAXIMUM = tl.constexpr(-1.0e30)


@triton.jit
def pack_gqa(rows, num_tokens, kv_head, GROUP: tl.constexpr):
    """Per row: whether it exists, its query token in the segment, and its head.

    All heads that share a KV head are packed into one tile (GQA packing): row r is token r // GROUP and head r % GROUP
    of the group. Rows past the end repeat the last token.
    """
    token = tl.minimum(rows // GROUP, num_tokens - 1)
    return rows < num_tokens * GROUP, token, kv_head * GROUP + rows % GROUP


@triton.jit
def row_pointers(base, token, head, columns, strides):
    """[BLOCK_M, HEAD_PAD]: pointers into a tensor [T, H, D]. token: counted over the whole step."""
    return base + (token.to(tl.int64) * strides[0] + head * strides[1])[:, None] + columns[None, :]


@triton.jit
def init_softmax(sinks, head, counts_sink):
    """State of the online softmax before the first key: row_max and row_sum, [BLOCK_M] each.

    sinks: pointer to one score per head that belongs to no key, or None; it counts only if counts_sink is true.
    """
    row_max = tl.full(head.shape, NO_MAXIMUM, tl.float32)
    row_sum = tl.zeros(head.shape, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        row_max = tl.where(counts_sink, sink, row_max)
        row_sum = tl.where(counts_sink, 1.0, row_sum)
    return row_max, row_sum


@triton.jit
def load_pages(pages, first_key, num_keys, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64: page of the keys from first_key on, or [BLOCK_N] pages if they are smaller; 0 past num_keys.

    pages: pointer to the segment's row of the plan's table. first_key: a multiple of BLOCK_N.
    """
    if PAGE_SIZE >= BLOCK_N:  # one page holds the whole tile
        return tl.load(pages + first_key // PAGE_SIZE).to(tl.int64)
    else:
        keys = first_key + tl.arange(0, BLOCK_N)
        return tl.load(pages + keys // PAGE_SIZE, mask=keys < num_keys, other=0).to(tl.int64)


@triton.jit
def key_offsets(page, first_key, page_stride, token_stride, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64 [BLOCK_N]: offsets of the keys from first_key into a cache. page: as returned by ``load_pages``."""
    slots = (first_key + tl.arange(0, BLOCK_N)) % PAGE_SIZE
    return page * page_stride + slots * token_stride


@triton.jit
def load_tile(cache, offsets, columns, num_rows, MASK_ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """[BLOCK_N, HEAD_PAD]: one tile of keys or values; 0 in rows past num_rows and in columns past HEAD_SIZE.

    MASK_ROWS: False if all rows exist, which needs no mask.
    """
    pointers = cache + offsets[:, None] + columns[None, :]
    in_head = columns[None, :] < HEAD_SIZE
    if MASK_ROWS:
        exists = tl.arange(0, offsets.shape[0])[:, None] < num_rows
        return tl.load(pointers, mask=exists & in_head, other=0.0)
    elif columns.shape[0] == HEAD_SIZE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=in_head, other=0.0)


@triton.jit
def base2_scores(query, key, scale, soft_cap, SOFT_CAP: tl.constexpr, PRECISION: tl.constexpr):
    """float32 [BLOCK_M, BLOCK_N]: scaled (and capped) scores of query [BLOCK_M, D] and key [BLOCK_N, D], in base 2.

    scale: the attention scale, times log2(e) unless SOFT_CAP. soft_cap: in natural units.
    """
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    if SOFT_CAP:
        # cap * tanh(x / cap) with tanh(x) = 1 - 2 / (exp(2 x) + 1)
        tanh = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / soft_cap)) + 1.0)
        scores = tanh * (soft_cap * LOG2_E)
    return scores


@triton.jit
def online_softmax(scores, row_max, row_sum):
    """One step of the online softmax over scores [BLOCK_M, BLOCK_N]; row_max and row_sum: [BLOCK_M].

    Returns the weights [BLOCK_M, BLOCK_N], the rescale factor for what was accumulated before, and the new row_max and
    row_sum.
    """
    new_row_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores - new_row_max[:, None])
    rescale = tl.exp2(row_max - new_row_max)
    return weights, rescale, new_row_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def attend(
    page,
    first_key,
    visible_keys,
    num_keys,
    query,
    accumulator,
    row_max,
    row_sum,
    kv_cache,
    columns,
    cache_strides,
    scale,
    soft_cap,
    MASK: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attend to the tile of keys that begins at first_key; returns accumulator, row_max and row_sum.

    page: the tile's, as returned by ``load_pages``. kv_cache: pointer to the KV head's first key; the value follows.
    visible_keys: int32 [BLOCK_M], number of the segment's keys that each row sees; used only if MASK.
    """
    # [BLOCK_N, HEAD_PAD]
    offsets = key_offsets(page, first_key, cache_strides[0], cache_strides[2], PAGE_SIZE, BLOCK_N)
    key = load_tile(kv_cache, offsets, columns, num_keys - first_key, MASK, HEAD_SIZE).to(query.dtype)
    # [BLOCK_N, HEAD_PAD]: loaded before the keys are used, so that both loads are in flight together
    values = kv_cache + HEAD_SIZE
    value = load_tile(values, offsets, columns, num_keys - first_key, MASK, HEAD_SIZE).to(query.dtype)
    # [BLOCK_M, BLOCK_N]
    scores = base2_scores(query, key, scale, soft_cap, SOFT_CAP, PRECISION)
    if MASK:
        keys = first_key + tl.arange(0, BLOCK_N)
        scores = tl.where(keys[None, :] < visible_keys[:, None], scores, float("-inf"))
    weights, rescale, row_max, row_sum = online_softmax(scores, row_max, row_sum)
    # [BLOCK_M, HEAD_PAD]
    accumulator = tl.dot(
        weights.to(query.dtype), value, accumulator * rescale[:, None], input_precision=PRECISION
    )
    return accumulator, row_max, row_sum
