"""Which tile of queries a program of the Hopper prefill kernel takes when, and where the tile's keys end."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tile_of_turn(round, num_tiles):
    """The tile of this program in its round-th turn. Odd rounds go backwards, so that each program gets equal work."""
    width = gl.num_programs(0)
    place = gl.where(round % 2 == 0, gl.program_id(0), width - 1 - gl.program_id(0))
    return gl.minimum(round * width + place, num_tiles)


@gluon.jit
def tile_indices(tile, num_segments, num_kv_heads, GROUP: gl.constexpr, TILES: gl.constexpr):
    """Segment, KV head, query head and first token of a tile.

    The last segments, which have the most keys, come first, and tiles that share keys come next to each other.
    """
    per_segment = num_kv_heads * (GROUP * TILES)
    segment = gl.maximum(num_segments - 1 - tile // per_segment, 0)
    kv_head = tile % per_segment // (GROUP * TILES)
    head = kv_head * GROUP + tile % GROUP
    first_token = tile % (GROUP * TILES) // GROUP * 128
    return segment, kv_head, head, first_token


@gluon.jit
def tile_end_key(first_token, num_tokens, num_keys):
    """Where the keys of a tile end; 0 or less where it has no query token."""
    end_key = num_keys - num_tokens + gl.minimum(first_token + 128, num_tokens)
    return gl.where(first_token < num_tokens, end_key, 0)
