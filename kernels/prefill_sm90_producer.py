"""The producer of the Hopper prefill kernel: one warp that moves queries, keys and values into shared memory.

A stage holds a tile of keys and the values of the previous tile of keys: what one step of a consumer reads. A TMA copy
moves one box: one panel (``PANEL`` columns) of the rows that one page contributes to a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from vllm_power.kernels.gluon_names import async_load
from vllm_power.kernels.prefill_sm90_tiles import (
    BLOCK_N,
    CONSUMERS,
    ELEMENT_BYTES,
    HALF_M,
    PANEL,
    STRIP,
    phase_of,
    stage_of,
    tile_end_key,
    tile_indices,
    tile_of_turn,
)


@gluon.jit
def _copy_tile(
    descriptor, first_column, pages, kv_head, first_key, num_keys, full, boxes, stage,
    PAGE_SIZE: gl.constexpr, HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Start the copy of one tile of keys or values into its stage, page by page if a page is smaller than a tile.

    first_column: of the cache, 0 for keys and HEAD_SIZE for values. full: the barrier that counts the bytes.
    boxes: [stages * panels * pages of a tile, 1, 1, ROWS, PANEL]. Past the last key, the last page is copied again.
    """
    ROWS: gl.constexpr = min(PAGE_SIZE, BLOCK_N)
    PANELS: gl.constexpr = HEAD_SIZE // PANEL
    for box in gl.static_range(BLOCK_N // ROWS):
        key = gl.minimum(first_key + box * ROWS, (num_keys - 1) // ROWS * ROWS)
        page = gl.load(pages + key // PAGE_SIZE)
        for panel in gl.static_range(PANELS):
            target = boxes.index((stage * PANELS + panel) * (BLOCK_N // ROWS) + box)
            async_load(
                descriptor, [page, kv_head, key % PAGE_SIZE, first_column + panel * PANEL], full, target
            )


@gluon.jit
def _clear_rows(strips, stage, first_row, HEAD_SIZE: gl.constexpr):
    """Zero a stage's rows of values from first_row on.

    strips: [stages * panels * strips of a tile, STRIP, PANEL].
    """
    PANELS: gl.constexpr = HEAD_SIZE // PANEL
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    rows = gl.arange(0, STRIP, gl.SliceLayout(1, layout))
    for strip in range(first_row // STRIP, BLOCK_N // STRIP):
        for panel in gl.static_range(PANELS):
            target = strips.index((stage * PANELS + panel) * (BLOCK_N // STRIP) + strip)
            kept = (strip * STRIP + rows < first_row)[:, None]
            target.store(gl.where(kept, target.load(layout), 0.0))


@gluon.jit
def _copy_values(
    descriptor, pages, kv_head, first_key, num_keys, full, tail_full, tail_tiles, boxes, strips, stage,
    PAGE_SIZE: gl.constexpr, HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Start the copy of a tile of values; returns how many of the tiles so far extended past the last key.

    Rows past the keys may hold NaN, which a weight of 0 does not hide. The producer waits for the copy of such a tile
    (a tail) and clears these rows before it passes the tile to the consumers.
    """
    BYTES: gl.constexpr = BLOCK_N * HEAD_SIZE * ELEMENT_BYTES
    if first_key + BLOCK_N > num_keys:
        mbarrier.expect(tail_full, BYTES)
        _copy_tile(
            descriptor, HEAD_SIZE, pages, kv_head, first_key, num_keys, tail_full, boxes, stage, PAGE_SIZE, HEAD_SIZE
        )  # fmt: skip
        mbarrier.wait(tail_full, tail_tiles & 1)
        _clear_rows(strips, stage, num_keys - first_key, HEAD_SIZE)
        fence_async_shared()
        mbarrier.arrive(full, count=1)
        tail_tiles += 1
    else:
        mbarrier.expect(full, BYTES)
        _copy_tile(
            descriptor, HEAD_SIZE, pages, kv_head, first_key, num_keys, full, boxes, stage, PAGE_SIZE, HEAD_SIZE
        )  # fmt: skip
    return tail_tiles


@gluon.jit
def produce(
    query_descriptor, cache_descriptor, query_boxes, key_boxes, value_boxes, value_strips, q_full, q_empty, kv_full,
    kv_empty, tail_full, segment_start_loc, key_lens, segment_pages, segment_pages_stride, num_segments, num_kv_heads,
    num_tiles, GROUP: gl.constexpr, TILES: gl.constexpr, PAGE_SIZE: gl.constexpr, HEAD_SIZE: gl.constexpr,
):  # fmt: skip
    """Fill one stage per step, with a tile of keys and the values of the previous step's keys.

    q_full, q_empty: one barrier per half of a query tile and stage. kv_full, kv_empty: one per stage; kv_full needs two
    arrivals, of keys and of values. tail_full: for values that the producer clears in part.
    """
    PANELS: gl.constexpr = HEAD_SIZE // PANEL
    key_tiles = 0  # tiles of keys so far
    query_tiles = 0  # tiles of queries so far
    tail_tiles = 0  # tiles of values so far that extended past the last key
    value_pages = segment_pages
    value_head = 0
    value_key = 0
    value_end = 0
    turn = 0
    tile = tile_of_turn(0, num_tiles)
    while tile < num_tiles:
        segment, kv_head, head, first_token = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)
        start = gl.load(segment_start_loc + segment)
        num_keys = gl.load(key_lens + segment)
        end_key = tile_end_key(first_token, gl.load(segment_start_loc + segment + 1) - start, num_keys)
        if end_key > 0:
            pages = segment_pages + segment.to(gl.int64) * segment_pages_stride
            for half in gl.static_range(CONSUMERS):
                slot = stage_of(query_tiles) * CONSUMERS + half
                mbarrier.wait(q_empty.index(slot), phase_of(query_tiles) ^ 1)
                mbarrier.expect(q_full.index(slot), HALF_M * HEAD_SIZE * ELEMENT_BYTES)
                for panel in gl.static_range(PANELS):
                    async_load(
                        query_descriptor,
                        [start + first_token + half * HALF_M, head, panel * PANEL],
                        q_full.index(slot),
                        query_boxes.index(slot * PANELS + panel),
                    )
            query_tiles += 1
            last = (end_key - 1) // BLOCK_N
            for step in range(last + 1):
                first_key = (last - step) * BLOCK_N
                stage = stage_of(key_tiles)
                mbarrier.wait(kv_empty.index(stage), phase_of(key_tiles) ^ 1)
                mbarrier.expect(kv_full.index(stage), BLOCK_N * HEAD_SIZE * ELEMENT_BYTES)
                _copy_tile(
                    cache_descriptor, 0, pages, kv_head, first_key, num_keys, kv_full.index(stage), key_boxes, stage,
                    PAGE_SIZE, HEAD_SIZE,
                )  # fmt: skip
                if key_tiles > 0:
                    tail_tiles = _copy_values(
                        cache_descriptor, value_pages, value_head, value_key, value_end, kv_full.index(stage),
                        tail_full, tail_tiles, value_boxes, value_strips, stage, PAGE_SIZE, HEAD_SIZE,
                    )  # fmt: skip
                else:
                    mbarrier.arrive(kv_full.index(stage), count=1)
                value_pages = pages
                value_head = kv_head
                value_key = first_key
                value_end = num_keys
                key_tiles += 1
        turn += 1
        tile = tile_of_turn(turn, num_tiles)
    if key_tiles > 0:
        # The last values, in a stage without keys.
        stage = stage_of(key_tiles)
        mbarrier.wait(kv_empty.index(stage), phase_of(key_tiles) ^ 1)
        mbarrier.arrive(kv_full.index(stage), count=1)
        _copy_values(
            cache_descriptor, value_pages, value_head, value_key, value_end, kv_full.index(stage),
            tail_full, tail_tiles, value_boxes, value_strips, stage, PAGE_SIZE, HEAD_SIZE,
        )  # fmt: skip
