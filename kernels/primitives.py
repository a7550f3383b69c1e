"""Small Triton functions that the kernels share: packed rows, keys in the paged cache, and the running softmax.

Scores are kept in base-2 units (natural units times log2(e)), so that a weight is one ``exp2``.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# Where a row has seen no key yet. Finite, so that a tile without a visible key leaves zeros and not NaN.
NO_MAXIMUM = tl.constexpr(-1.0e30)


@triton.jit
def packed_rows(rows, num_tokens, kv_head, GROUP: tl.constexpr):
    """Whether each of ``rows`` exists, its query token in the segment, and its head.

    All heads that share a KV head are packed into one tile: row r is token r // GROUP and head r % GROUP of the group.
    Rows past the end repeat the last token.
    """
    token = tl.minimum(rows // GROUP, num_tokens - 1)
    return rows < num_tokens * GROUP, token, kv_head * GROUP + rows % GROUP


@triton.jit
def row_pointers(base, token, head, columns, strides):
    """[BLOCK_M, HEAD_PAD]: pointers into a tensor [T, H, D]. token: counted over the whole step."""
    return base + (token.to(tl.int64) * strides[0] + head * strides[1])[:, None] + columns[None, :]


@triton.jit
def first_softmax(sinks, head, counts_sink):
    """The running softmax before the first key: maximum and total, [BLOCK_M] each.

    sinks: pointer to a score for each head that belongs to no key, or None; it counts only where counts_sink is true.
    """
    maximum = tl.full(head.shape, NO_MAXIMUM, tl.float32)
    total = tl.zeros(head.shape, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        maximum = tl.where(counts_sink, sink, maximum)
        total = tl.where(counts_sink, 1.0, total)
    return maximum, total


@triton.jit
def load_pages(pages, first_key, num_keys, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64: the page of keys first_key .. of a segment, or [BLOCK_N] where pages are smaller; 0 from num_keys on.

    pages: pointer to the segment's row of the plan's table. first_key: a multiple of BLOCK_N.
    """
    if PAGE_SIZE >= BLOCK_N:  # one page holds the whole tile
        return tl.load(pages + first_key // PAGE_SIZE).to(tl.int64)
    else:
        keys = first_key + tl.arange(0, BLOCK_N)
        return tl.load(pages + keys // PAGE_SIZE, mask=keys < num_keys, other=0).to(tl.int64)


@triton.jit
def key_offsets(page, first_key, page_stride, token_stride, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """int64 [BLOCK_N]: offsets into a cache of keys first_key .. of a segment. page: as ``load_pages`` gives it."""
    slots = (first_key + tl.arange(0, BLOCK_N)) % PAGE_SIZE
    return page * page_stride + slots * token_stride


@triton.jit
def load_tile(cache, offsets, columns, num_rows, MASK_ROWS: tl.constexpr, HEAD_SIZE: tl.constexpr):
    """[BLOCK_N, HEAD_PAD]: one tile of keys or values; zero in rows from num_rows on and in columns past HEAD_SIZE.

    MASK_ROWS: False where all rows are known to exist, which spares their mask.
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
        bent = 1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E / soft_cap)) + 1.0)
        scores = bent * (soft_cap * LOG2_E)
    return scores


@triton.jit
def online_softmax(scores, maximum, total):
    """One step of the running softmax over scores [BLOCK_M, BLOCK_N]; maximum and total: [BLOCK_M].

    Returns the weights [BLOCK_M, BLOCK_N], the factor for what was accumulated before, and the new maximum and total.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    weights = tl.exp2(scores - new_maximum[:, None])
    decay = tl.exp2(maximum - new_maximum)
    return weights, decay, new_maximum, total * decay + tl.sum(weights, 1)


@triton.jit
def attend(
    page,
    first_key,
    visible_keys,
    num_keys,
    query,
    accumulator,
    maximum,
    total,
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
    """Attend to the tile of keys that begins at first_key; returns accumulator, maximum and total.

    page: the tile's, as ``load_pages`` gives it. kv_cache: pointer to the KV head's first key, whose value follows it.
    visible_keys: int32 [BLOCK_M], how many of the segment's keys each row sees; looked at only where MASK.
    """
    # [BLOCK_N, HEAD_PAD]
    offsets = key_offsets(page, first_key, cache_strides[0], cache_strides[2], PAGE_SIZE, BLOCK_N)
    key = load_tile(kv_cache, offsets, columns, num_keys - first_key, MASK, HEAD_SIZE).to(query.dtype)
    # [BLOCK_N, HEAD_PAD]: asked for before the keys are used, so that both are under way together
    values = kv_cache + HEAD_SIZE
    value = load_tile(values, offsets, columns, num_keys - first_key, MASK, HEAD_SIZE).to(query.dtype)
    # [BLOCK_M, BLOCK_N]
    scores = base2_scores(query, key, scale, soft_cap, SOFT_CAP, PRECISION)
    if MASK:
        keys = first_key + tl.arange(0, BLOCK_N)
        scores = tl.where(keys[None, :] < visible_keys[:, None], scores, float("-inf"))
    weights, decay, maximum, total = online_softmax(scores, maximum, total)
    # [BLOCK_M, HEAD_PAD]
    accumulator = tl.dot(
        weights.to(query.dtype), value, accumulator * decay[:, None], input_precision=PRECISION
    )
    return accumulator, maximum, total
