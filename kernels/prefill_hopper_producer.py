"""The producer of the Hopper prefill kernel: one warp that moves queries, keys and values into shared memory.

A stage holds a tile of keys and the values of the tile of keys before it: what a consumer's step reads together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from vllm_power.kernels.prefill_hopper_tiles import tile_end_key, tile_indices, tile_of_turn


@gluon.jit
def _copy_tile(
    descriptor, first_column, pages, kv_head, first_key, num_keys, ready, pieces, stage,
    PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Start the copy of one tile of keys or values into its stage; page by page, where a page is less than a tile.

    first_column: of the cache, 0 for keys and HEAD_SIZE for values.
    pieces: [stages * panels * pages of a tile, 1, 1, rows, PANEL]. Where the keys end, the last page is copied again.
    """
    ROWS: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    PANELS: gl.constexpr = HEAD_SIZE // 64
    for piece in gl.static_range(BLOCK_N // ROWS):
        key = gl.minimum(first_key + piece * ROWS, (num_keys - 1) // ROWS * ROWS)
        page = gl.load(pages + key // PAGE_SIZE)
        for panel in gl.static_range(PANELS):
            target = pieces.index((stage * PANELS + panel) * (BLOCK_N // ROWS) + piece)
            tma.async_copy_global_to_shared(
                descriptor, [page, kv_head, key % PAGE_SIZE, first_column + panel * 64], ready, target
            )


@gluon.jit
def _clear_rows(strips, stage, first_row, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr):
    """Zero a stage's rows of values from first_row on. strips: [stages * panels * BLOCK_N / 16, 16, PANEL]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    rows = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for strip in range(first_row // 16, BLOCK_N // 16):
        for panel in gl.static_range(HEAD_SIZE // 64):
            part = strips.index((stage * (HEAD_SIZE // 64) + panel) * (BLOCK_N // 16) + strip)
            kept = (strip * 16 + rows < first_row)[:, None]
            part.store(gl.where(kept, part.load(layout), 0.0))


@gluon.jit
def _copy_values(
    descriptor, pages, kv_head, first_key, num_keys, ready, tail_ready, tails, pieces, strips, stage,
    PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Start the copy of a tile of values; returns how many of the tiles so far ran past the last key.

    Rows past the keys may hold NaN, which a weight of 0 would not hide: such a tile is waited for and its rest cleared.
    """
    BYTES: gl.constexpr = BLOCK_N * HEAD_SIZE * 2
    if first_key + BLOCK_N > num_keys:
        mbarrier.expect(tail_ready, BYTES)
        _copy_tile(
            descriptor, HEAD_SIZE, pages, kv_head, first_key, num_keys, tail_ready, pieces, stage, PAGE_SIZE, BLOCK_N,
            HEAD_SIZE,
        )  # fmt: skip
        mbarrier.wait(tail_ready, tails & 1)
        _clear_rows(strips, stage, num_keys - first_key, BLOCK_N, HEAD_SIZE)
        fence_async_shared()
        mbarrier.arrive(ready, count=1)
        tails += 1
    else:
        mbarrier.expect(ready, BYTES)
        _copy_tile(
            descriptor, HEAD_SIZE, pages, kv_head, first_key, num_keys, ready, pieces, stage, PAGE_SIZE, BLOCK_N,
            HEAD_SIZE,
        )  # fmt: skip
    return tails


@gluon.jit
def produce(
    query_descriptor, cache_descriptor, queries, keys, values, value_strips, query_ready, query_free, ready, free,
    tail_ready, query_start_loc, key_lens, page_table, page_table_stride, num_segments, num_kv_heads, num_tiles,
    GROUP: gl.constexpr, TILES: gl.constexpr, PAGE_SIZE: gl.constexpr, BLOCK_N: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Fill stage after stage with a tile of keys and, of the step before, its values."""
    PANELS: gl.constexpr = HEAD_SIZE // 64
    count = 0  # tiles of keys so far
    done = 0  # tiles of queries so far
    tails = 0
    value_pages = page_table
    value_head = 0
    value_key = 0
    value_end = 0
    round = 0
    tile = tile_of_turn(0, num_tiles)
    while tile < num_tiles:
        segment, kv_head, head, first_token = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)
        start = gl.load(query_start_loc + segment)
        num_keys = gl.load(key_lens + segment)
        end_key = tile_end_key(first_token, gl.load(query_start_loc + segment + 1) - start, num_keys)
        if end_key > 0:
            pages = page_table + segment.to(gl.int64) * page_table_stride
            for half in gl.static_range(2):
                slot = (done & 1) * 2 + half
                mbarrier.wait(query_free.index(slot), (done >> 1) & 1 ^ 1)
                mbarrier.expect(query_ready.index(slot), 64 * HEAD_SIZE * 2)
                for panel in gl.static_range(PANELS):
                    tma.async_copy_global_to_shared(
                        query_descriptor,
                        [start + first_token + half * 64, head, panel * 64],
                        query_ready.index(slot),
                        queries.index(slot * PANELS + panel),
                    )
            done += 1
            last = (end_key - 1) // BLOCK_N
            for step in range(last + 1):
                first_key = (last - step) * BLOCK_N
                stage = count & 1
                mbarrier.wait(free.index(stage), (count >> 1) & 1 ^ 1)
                mbarrier.expect(ready.index(stage), BLOCK_N * HEAD_SIZE * 2)
                _copy_tile(
                    cache_descriptor, 0, pages, kv_head, first_key, num_keys, ready.index(stage), keys, stage,
                    PAGE_SIZE, BLOCK_N, HEAD_SIZE,
                )  # fmt: skip
                if count > 0:
                    tails = _copy_values(
                        cache_descriptor, value_pages, value_head, value_key, value_end, ready.index(stage),
                        tail_ready, tails, values, value_strips, stage, PAGE_SIZE, BLOCK_N, HEAD_SIZE,
                    )  # fmt: skip
                else:
                    mbarrier.arrive(ready.index(stage), count=1)
                value_pages = pages
                value_head = kv_head
                value_key = first_key
                value_end = num_keys
                count += 1
        round += 1
        tile = tile_of_turn(round, num_tiles)
    if count > 0:
        stage = count & 1
        mbarrier.wait(free.index(stage), (count >> 1) & 1 ^ 1)
        mbarrier.arrive(ready.index(stage), count=1)
        _copy_values(
            cache_descriptor, value_pages, value_head, value_key, value_end, ready.index(stage),
            tail_ready, tails, values, value_strips, stage, PAGE_SIZE, BLOCK_N, HEAD_SIZE,
        )  # fmt: skip
