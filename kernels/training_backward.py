"""Attention of whole texts under a pattern, backward: dQ by query tiles, dK and dV by the tiles that read a key tile.

No program adds to what another one writes, so the gradients are the same in every run. If far more query tiles read a
key tile than most (all of them read a sink), its readers are divided among several programs: each writes its part in
float32, and a last kernel sums the parts.
"""

import torch
import triton
import triton.language as tl

from vllm_power.kernels.training_tiles import (
    LOG2_E,
    NOTHING,
    PADDING,
    WORDS,
    load_rows,
    load_text,
    load_tokens,
    sees,
    store_tokens,
)


@triton.jit
def _add_to_query(
    query_tile, direction, log_sum, delta, gradient, key, value, row, start, first_key, length, kv_head,
    key_strides, value_strides, scale, positions, dense, bits,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the gradient of a query tile over BLOCK_N keys, without the scale."""
    keys = first_key + tl.arange(0, BLOCK_N)
    some = keys < length if CAUSAL else None
    key_tile = load_tokens(key, row, start + first_key, kv_head, key_strides, some, BLOCK_N, HEAD, HEAD_PAD)
    value_tile = load_tokens(
        value, row, start + first_key, kv_head, value_strides, some, BLOCK_N, VALUE, VALUE_PAD
    )
    # [TILE, BLOCK_N]
    scores = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION) * scale
    weights = tl.exp2(scores - log_sum[:, None])
    if MASK:
        seen = sees(positions[:, None], keys[None, :], dense[:, None], bits, CAUSAL, TILE, PARTS)
        weights = tl.where(seen, weights, 0.0)
    of_weights = tl.dot(direction, tl.trans(value_tile), input_precision=PRECISION)
    of_scores = (weights * (of_weights - delta[:, None])).to(key_tile.dtype)
    return tl.dot(of_scores, key_tile, gradient, input_precision=PRECISION)


@triton.jit(do_not_specialize=["shift"])
def _query_kernel(
    query, key, value, output, direction, log_sums, deltas, query_gradient, tiles, entries,
    query_strides, key_strides, value_strides, output_strides, direction_strides, gradient_strides,
    log_sums_strides, scale, shift,
    GROUP: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    gradient = tl.zeros([TILE, HEAD_PAD], tl.float32)
    if kind == PADDING:
        store_tokens(
            query_gradient, row, token, head, gradient_strides, exists, gradient, TILE, HEAD, HEAD_PAD
        )
        return
    whole = tl.load(record + 7)
    num_whole = tl.load(record + 8)
    partial = tl.load(record + 9)
    num_partial = tl.load(record + 10)
    own_bits = tl.load(record + 11)
    dense = (positions >= dense_from) & (positions < dense_to)

    query_tile = load_tokens(query, row, token, head, query_strides, exists, TILE, HEAD, HEAD_PAD)
    direction_tile = load_tokens(
        direction, row, token, head, direction_strides, exists, TILE, VALUE, VALUE_PAD
    )
    output_tile = load_tokens(output, row, token, head, output_strides, exists, TILE, VALUE, VALUE_PAD)
    # What the softmax subtracts from each row of gradients; the kernel for keys needs it too.
    delta = tl.sum(output_tile.to(tl.float32) * direction_tile.to(tl.float32), 1)
    deltas += row.to(tl.int64) * log_sums_strides[0] + head * log_sums_strides[1] + token
    tl.store(deltas + tl.arange(0, TILE), delta, mask=exists)
    log_sum = load_rows(log_sums, row, token, head, log_sums_strides, exists, float("inf"), TILE)

    base_two = scale * LOG2_E
    PER_TILE: tl.constexpr = TILE // BLOCK_N
    for step in range(0, num_whole * PER_TILE):
        key_tile_number = tl.load(entries + (whole + step // PER_TILE) * 2)
        first_key = key_tile_number * TILE + step % PER_TILE * BLOCK_N
        gradient = _add_to_query(
            query_tile, direction_tile, log_sum, delta, gradient, key, value, row, start, first_key, length,
            kv_head, key_strides, value_strides, base_two, positions, dense, 0,
            False, False, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_N,
        )  # fmt: skip
    if PARTIAL:
        for step in range(0, num_partial * PER_TILE):
            entry = entries + (partial + step // PER_TILE) * 2
            first_key = tl.load(entry) * TILE + step % PER_TILE * BLOCK_N
            gradient = _add_to_query(
                query_tile, direction_tile, log_sum, delta, gradient, key, value, row, start, first_key, length,
                kv_head, key_strides, value_strides, base_two, positions, dense, tl.load(entry + 1),
                True, False, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_N,
            )  # fmt: skip
    for step in range(0, PER_TILE):
        gradient = _add_to_query(
            query_tile, direction_tile, log_sum, delta, gradient, key, value, row, start,
            number * TILE + step * BLOCK_N, length,
            kv_head, key_strides, value_strides, base_two, positions, dense, own_bits,
            True, True, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_N,
        )  # fmt: skip
    gradient *= scale
    store_tokens(query_gradient, row, token, head, gradient_strides, exists, gradient, TILE, HEAD, HEAD_PAD)


@triton.jit
def _add_to_key(
    key_tile, value_tile, of_key, of_value, query, direction, log_sums, deltas, row, start, first_query, length,
    head, query_strides, direction_strides, log_sums_strides, scale, shift, keys, dense_from, dense_to, bits,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add the gradients of a key tile over BLOCK_M queries of one head, dK without the scale."""
    # [BLOCK_M]
    positions = first_query + tl.arange(0, BLOCK_M)
    token = start + first_query - shift
    exists = (positions < length) & (positions + start >= shift)
    query_tile = load_tokens(query, row, token, head, query_strides, exists, BLOCK_M, HEAD, HEAD_PAD)
    log_sum = load_rows(log_sums, row, token, head, log_sums_strides, exists, float("inf"), BLOCK_M)
    # [TILE, BLOCK_M]
    scores = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION) * scale
    weights = tl.exp2(scores - log_sum[None, :])
    if MASK:
        dense = (positions >= dense_from) & (positions < dense_to)
        seen = sees(positions[None, :], keys[:, None], dense[None, :], bits, CAUSAL, TILE, PARTS)
        weights = tl.where(seen, weights, 0.0)
    direction_tile = load_tokens(
        direction, row, token, head, direction_strides, exists, BLOCK_M, VALUE, VALUE_PAD
    )
    of_value = tl.dot(weights.to(direction_tile.dtype), direction_tile, of_value, input_precision=PRECISION)
    delta = load_rows(deltas, row, token, head, log_sums_strides, exists, 0.0, BLOCK_M)
    of_weights = tl.dot(value_tile, tl.trans(direction_tile), input_precision=PRECISION)
    of_scores = (weights * (of_weights - delta[None, :])).to(query_tile.dtype)
    of_key = tl.dot(of_scores, query_tile, of_key, input_precision=PRECISION)
    return of_key, of_value


@triton.jit(do_not_specialize=["shift"])
def _key_kernel(
    query, key, value, direction, log_sums, deltas, key_gradient, value_gradient, key_parts, value_parts,
    chunks, entries,
    query_strides, key_strides, value_strides, direction_strides, key_gradient_strides, value_gradient_strides,
    log_sums_strides, scale, shift,
    GROUP: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr,
    VALUE: tl.constexpr, VALUE_PAD: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0)
    record = chunks + tl.program_id(1) * WORDS
    kind = tl.load(record) & 3
    if kind == NOTHING:
        return
    row, start, length, number, dense_from, dense_to = load_text(record)

    # [TILE]
    keys = number * TILE + tl.arange(0, TILE)
    token = start + number * TILE
    exists = keys < length
    of_key = tl.zeros([TILE, HEAD_PAD], tl.float32)
    of_value = tl.zeros([TILE, VALUE_PAD], tl.float32)
    part = (tl.load(record) >> 2) - 1
    if kind != PADDING:
        whole = tl.load(record + 7)
        num_whole = tl.load(record + 8)
        partial = tl.load(record + 9)
        num_partial = tl.load(record + 10)
        own_bits = tl.load(record + 11)
        key_tile = load_tokens(key, row, token, kv_head, key_strides, exists, TILE, HEAD, HEAD_PAD)
        value_tile = load_tokens(value, row, token, kv_head, value_strides, exists, TILE, VALUE, VALUE_PAD)
        base_two = scale * LOG2_E
        PER_TILE: tl.constexpr = TILE // BLOCK_M
        for step in range(0, num_whole * GROUP * PER_TILE):
            head = kv_head * GROUP + step % GROUP
            query_tile_number = tl.load(entries + (whole + step // (GROUP * PER_TILE)) * 2)
            first_query = query_tile_number * TILE + step // GROUP % PER_TILE * BLOCK_M
            of_key, of_value = _add_to_key(
                key_tile, value_tile, of_key, of_value, query, direction, log_sums, deltas, row, start, first_query,
                length, head, query_strides, direction_strides, log_sums_strides, base_two, shift, keys,
                dense_from, dense_to, 0,
                False, False, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_M,
            )  # fmt: skip
        if PARTIAL:
            for step in range(0, num_partial * GROUP * PER_TILE):
                head = kv_head * GROUP + step % GROUP
                entry = entries + (partial + step // (GROUP * PER_TILE)) * 2
                first_query = tl.load(entry) * TILE + step // GROUP % PER_TILE * BLOCK_M
                of_key, of_value = _add_to_key(
                    key_tile, value_tile, of_key, of_value, query, direction, log_sums, deltas, row, start,
                    first_query, length, head, query_strides, direction_strides, log_sums_strides, base_two, shift,
                    keys, dense_from, dense_to, tl.load(entry + 1),
                    True, False, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_M,
                )  # fmt: skip
        # The tile's own queries, if this program has them, see its keys causally.
        own_steps = tl.where(own_bits != 0, GROUP * PER_TILE, 0)
        for step in range(0, own_steps):
            head = kv_head * GROUP + step % GROUP
            first_query = number * TILE + step // GROUP * BLOCK_M
            of_key, of_value = _add_to_key(
                key_tile, value_tile, of_key, of_value, query, direction, log_sums, deltas, row, start, first_query,
                length, head, query_strides, direction_strides, log_sums_strides, base_two, shift, keys,
                dense_from, dense_to, own_bits,
                True, True, PRECISION, HEAD, HEAD_PAD, VALUE, VALUE_PAD, TILE, PARTS, BLOCK_M,
            )  # fmt: skip
        of_key *= scale
    if part < 0:
        store_tokens(
            key_gradient, row, token, kv_head, key_gradient_strides, exists, of_key, TILE, HEAD, HEAD_PAD
        )
        store_tokens(
            value_gradient,
            row,
            token,
            kv_head,
            value_gradient_strides,
            exists,
            of_value,
            TILE,
            VALUE,
            VALUE_PAD,
        )
    else:  # parts are full tiles, [parts, G, TILE, pad]
        tile = (part.to(tl.int64) * tl.num_programs(0) + kv_head) * TILE + tl.arange(0, TILE)[:, None]
        tl.store(key_parts + tile * HEAD_PAD + tl.arange(0, HEAD_PAD)[None, :], of_key)
        tl.store(value_parts + tile * VALUE_PAD + tl.arange(0, VALUE_PAD)[None, :], of_value)


@triton.jit
def _sum_kernel(
    parts, gradient, sums, gradient_strides, HEAD: tl.constexpr, HEAD_PAD: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the parts of BLOCK tokens of a key tile whose readers several programs had."""
    kv_head = tl.program_id(0)
    record = sums + tl.program_id(1) * WORDS
    if tl.load(record) == NOTHING:
        return
    row, start, length, number, first_part, num_parts = load_text(record)
    first = tl.program_id(2) * BLOCK
    places = first + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, HEAD_PAD], tl.float32)
    for part in range(0, num_parts):
        tile = ((first_part + part).to(tl.int64) * tl.num_programs(0) + kv_head) * TILE + places[:, None]
        total += tl.load(parts + tile * HEAD_PAD + tl.arange(0, HEAD_PAD)[None, :])
    exists = number * TILE + places < length
    token = start + number * TILE + first
    store_tokens(gradient, row, token, kv_head, gradient_strides, exists, total, BLOCK, HEAD, HEAD_PAD)


def backward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sums: torch.Tensor,
    direction: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tiles: torch.Tensor,
    chunks: torch.Tensor,
    sums: torch.Tensor,
    entries: torch.Tensor,
    scale: float,
    tile: int,
    parts: int,
    partial: bool,
    of_query: dict[str, int],
    of_key: dict[str, int],
) -> None:
    """Write the gradients of query, key and value: ``gradients``, of the same shapes.

    direction: the gradient of ``output``; both and log_sums are shaped as in the forward kernel. chunks and sums,
    like the rest: of a vllm_power.hf.tiles.Lists. of_query: num_warps, num_stages and BLOCK_N, the keys per step;
    of_key: the same with BLOCK_M, the queries per step.
    """
    heads, head = query.shape[2:]
    kv_heads, width = value.shape[2:]
    pads = triton.next_power_of_2(head), triton.next_power_of_2(width)
    deltas = torch.empty_like(log_sums)
    sizes = {
        "PRECISION": "ieee",
        "PARTIAL": partial,
        "GROUP": heads // kv_heads,
        "HEAD": head,
        "HEAD_PAD": pads[0],
        "VALUE": width,
        "VALUE_PAD": pads[1],
        "TILE": tile,
        "PARTS": parts,
    }
    common = {
        "query": query,
        "key": key,
        "value": value,
        "direction": direction,
        "log_sums": log_sums,
        "deltas": deltas,
        "entries": entries,
        "query_strides": query.stride()[:3],
        "key_strides": key.stride()[:3],
        "value_strides": value.stride()[:3],
        "direction_strides": direction.stride()[:3],
        "log_sums_strides": log_sums.stride()[:2],
        "scale": scale,
        "shift": key.shape[1] - query.shape[1],
    }
    _query_kernel[(heads, len(tiles))](
        **common,
        output=output,
        output_strides=output.stride()[:3],
        query_gradient=gradients[0],
        gradient_strides=gradients[0].stride()[:3],
        tiles=tiles,
        **sizes,
        **of_query,
    )
    shape = (len(chunks), kv_heads, tile)  # at most as many parts as chunks
    key_parts, value_parts = (query.new_empty(*shape, pad, dtype=torch.float32) for pad in pads)
    _key_kernel[(kv_heads, len(chunks))](
        **common,
        key_gradient=gradients[1],
        value_gradient=gradients[2],
        key_parts=key_parts,
        value_parts=value_parts,
        key_gradient_strides=gradients[1].stride()[:3],
        value_gradient_strides=gradients[2].stride()[:3],
        chunks=chunks,
        **sizes,
        **of_key,
    )
    rows = min(tile, 16)
    for summed, gradient in ((key_parts, gradients[1]), (value_parts, gradients[2])):
        _sum_kernel[(kv_heads, len(sums), tile // rows)](
            parts=summed,
            gradient=gradient,
            sums=sums,
            gradient_strides=gradient.stride()[:3],
            HEAD=gradient.shape[3],
            HEAD_PAD=summed.shape[3],
            TILE=tile,
            BLOCK=rows,
        )
