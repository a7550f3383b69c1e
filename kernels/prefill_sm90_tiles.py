"""Sizes that every part of the Hopper prefill kernel shares, and the order in which a program takes its query tiles.

This is the only place that states the sizes. The assertions below name what else depends on a value.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Consumer warpgroups. Each attends with its own half of a query tile.
CONSUMERS = gl.constexpr(2)
# Query tokens of a half: the rows of one warpgroup's matrix product (wgmma), 16 for each of its 4 warps.
HALF_M = gl.constexpr(64)
# Query tokens of a tile.
BLOCK_M = gl.constexpr(CONSUMERS.value * HALF_M.value)
# Keys of a tile.
BLOCK_N = gl.constexpr(128)
# Columns of a panel: 128 bytes, the widest swizzle. Tiles lie in shared memory panel by panel.
PANEL = gl.constexpr(64)
# Rows of a strip, the unit in which values past the last key are cleared.
STRIP = gl.constexpr(16)
# Shared-memory stages: of keys and values, and of query tiles.
STAGES = gl.constexpr(2)
# Bytes of an element: the kernel takes bfloat16 and float16.
ELEMENT_BYTES = gl.constexpr(2)
# Bytes of a swizzled row.
SWIZZLE = gl.constexpr(128)

assert CONSUMERS.value == 2, "prefill_sm90 starts two consumers and lists the warps of each role"
assert HALF_M.value == 64, "a warpgroup's matrix product has 64 rows"
assert BLOCK_N.value % STRIP.value == 0 and BLOCK_N.value & (BLOCK_N.value - 1) == 0, (
    "pages are powers of two"
)
assert BLOCK_N.value <= 256, "a matrix product has at most 256 columns, a TMA box at most 256 rows"
assert PANEL.value * ELEMENT_BYTES.value == SWIZZLE.value, "a panel is as wide as the swizzle"
assert STRIP.value % 8 == 0, "the swizzle repeats every 8 rows"
assert STAGES.value == 2, "stage_of and phase_of take a stage and its phase from one bit each"


@gluon.jit
def stage_of(count):
    """The stage of the tile that ``count`` tiles precede."""
    return count & 1


@gluon.jit
def phase_of(count):
    """The phase of that stage's "full" barrier; its "empty" barrier is one phase behind."""
    return (count >> 1) & 1


@gluon.jit
def tile_of_turn(turn, num_tiles):
    """The query tile of this program in a turn. Odd turns run backwards, so that every program gets equal work."""
    width = gl.num_programs(0)
    place = gl.where(turn % 2 == 0, gl.program_id(0), width - 1 - gl.program_id(0))
    return gl.minimum(turn * width + place, num_tiles)


@gluon.jit
def tile_indices(tile, num_segments, num_kv_heads, GROUP: gl.constexpr, TILES: gl.constexpr):
    """Segment, KV head, query head and first token of a query tile.

    The last segments, which have the most keys, come first, and tiles that share keys come next to each other.
    """
    per_segment = num_kv_heads * (GROUP * TILES)
    segment = gl.maximum(num_segments - 1 - tile // per_segment, 0)
    kv_head = tile % per_segment // (GROUP * TILES)
    head = kv_head * GROUP + tile % GROUP
    first_token = tile % (GROUP * TILES) // GROUP * BLOCK_M
    return segment, kv_head, head, first_token


@gluon.jit
def tile_end_key(first_token, num_tokens, num_keys):
    """The end of a query tile's keys; 0 or less if the tile has no query token."""
    end_key = num_keys - num_tokens + gl.minimum(first_token + BLOCK_M, num_tokens)
    return gl.where(first_token < num_tokens, end_key, 0)
