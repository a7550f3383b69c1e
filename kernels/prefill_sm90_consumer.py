"""A consumer of the Hopper prefill kernel: one warpgroup that attends with its half of every query tile.

The software pipeline. A step takes one tile of keys. It issues two matrix products together: the scores of its own keys
(S = Q K), and the weights of the previous step times their values (O += P V). While the second runs on the tensor
cores, the softmax of the first runs on the other units. Two consecutive steps overlap even if they belong to different
query tiles, so that the tensor cores do not idle at the border. Here a query tile has the key tiles 0 to 2 in the order
in which they are taken, and the next query tile has 0' and so on:

    step          0           1            2            0'                  1'
    stage holds   K0          K1, V0       K2, V1       K0', V2             K1', V0'
    tensor cores  S0          S1, P0 V0    S2, P1 V1    S0', P2 V2          S1', P0' V0'
    other units   softmax P0  softmax P1   softmax P2   softmax P0', store  softmax P1'

So values lag one tile behind keys, and three things lag with them:

- ``weights`` enter a step as those of the previous step's keys.
- ``accumulator`` is, in step 0', still the one of the previous query tile: its last product P2 V2 is in flight while
  the first softmax of the new tile runs. It is complete, and stored, only after step 0'. The new tile then starts from
  zero; after every other step the accumulator is rescaled to the new ``row_max``.
- ``row_sum`` therefore stays the previous tile's until that store. Step 0' collects the new tile's in ``new_row_sum``.
  For the same reason ``finished``, ``finished_first`` and ``finished_tokens`` say where the previous tile's rows go.

One product remains after the last query tile, which no step follows.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from vllm_power.kernels.prefill_sm90_tiles import (
    BLOCK_N,
    CONSUMERS,
    HALF_M,
    phase_of,
    stage_of,
    tile_end_key,
    tile_indices,
    tile_of_turn,
)
from vllm_power.kernels.primitives import LOG2_E, NO_MAXIMUM


@gluon.jit
def _online_softmax(scores, row_max, row_sum, scale):
    """One step of the online softmax over scores [HALF_M, BLOCK_N]: weights, rescale, new row_max and new row_sum.

    rescale: the factor for what was accumulated before. The same as ``primitives.online_softmax``, except that the
    scale is applied here. It stands in two places because a Gluon kernel cannot call a Triton function.
    """
    new_row_max = gl.maximum(row_max, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_row_max[:, None])
    rescale = gl.exp2(row_max - new_row_max)
    return weights, rescale, new_row_max, row_sum * rescale + gl.sum(weights, 1)


@gluon.jit
def _attend_tile(
    query, keys, values, kv_full, kv_empty, key_tiles, diagonal, weights, accumulator, row_max, row_sum, scale,
    soft_cap, MASK: gl.constexpr, SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """One step of the pipeline: scores and softmax of this tile's keys, product of the previous tile's weights.

    key_tiles: the tiles of keys before this one. diagonal: if MASK, the last key of the tile that the first token sees.
    weights: of the previous tile of keys. In the first step of a query tile, weights and accumulator are those of the
    previous query tile, while row_max and row_sum are the initial ones of this query tile.
    Returns this tile's weights, the rescale factor, the accumulator with the previous tile's product, row_max, row_sum.
    This step's stage is full on entry; the next one is full on return.
    """
    stage = stage_of(key_tiles)
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accumulator.type.layout, 2)
    # [HALF_M, BLOCK_N]
    weights = gl.convert_layout(weights.to(query.dtype), WEIGHTS)
    scores = gl.zeros([HALF_M, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    # [HALF_M, HEAD_SIZE]
    accumulator = warpgroup_mma(weights, values.index(stage), accumulator, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    # As in primitives.base2_scores. Before the mask: a soft-capped -inf is a finite score.
    if SOFT_CAP:
        scores = 1.0 - 2.0 / (gl.exp2(scores * (2.0 * LOG2_E * scale / soft_cap)) + 1.0)
        scale = soft_cap * LOG2_E
    if MASK:
        # Tokens past the segment's end see keys past its keys; their rows are never stored.
        visible = diagonal + gl.arange(0, HALF_M, gl.SliceLayout(1, SCORES))
        offsets = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        scores = gl.where(offsets[None, :] <= visible[:, None], scores, float("-inf"))
    new_weights, rescale, row_max, row_sum = _online_softmax(scores, row_max, row_sum, scale)
    # Waiting for the next stage here also keeps the compiler from moving the next line before the softmax.
    mbarrier.wait(kv_full.index(stage_of(key_tiles + 1)), phase_of(key_tiles + 1))
    accumulator, new_weights = warpgroup_mma_wait(0, deps=[accumulator, new_weights])
    mbarrier.arrive(kv_empty.index(stage), count=1)
    return new_weights, rescale, accumulator, row_max, row_sum


@gluon.jit
def _rescaled(accumulator, rescale):
    """The accumulator [HALF_M, HEAD_SIZE] times a factor per row, [HALF_M]."""
    return accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, accumulator.type.layout))[:, None]


@gluon.jit
def _store(output, accumulator, row_sum, first_token, num_tokens, stride_token):
    """Normalize and write the finished rows of a query tile.

    output: pointer to the tile's head in the segment's first token. row_sum: the tile's own.
    """
    layout: gl.constexpr = accumulator.type.layout
    tokens = first_token + gl.arange(0, HALF_M, gl.SliceLayout(1, layout))
    columns = gl.arange(0, accumulator.shape[1], gl.SliceLayout(0, layout))
    # [HALF_M, HEAD_SIZE]
    accumulator = _rescaled(accumulator, 1.0 / row_sum)
    pointers = output + tokens[:, None] * stride_token + columns[None, :]
    gl.store(pointers, accumulator.to(output.dtype.element_ty), mask=(tokens < num_tokens)[:, None])


@gluon.jit
def consume(
    output, queries, keys, values, q_full, q_empty, kv_full, kv_empty, segment_start_loc, key_lens,
    sinks, num_segments, num_kv_heads, num_tiles, output_stride_token, output_stride_head, scale, soft_cap,
    GROUP: gl.constexpr, TILES: gl.constexpr, SOFT_CAP: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    """Attend with one half of every query tile of this program. The module describes the pipeline.

    queries: [STAGES * CONSUMERS, HALF_M, HEAD_SIZE]. keys, values: [STAGES, BLOCK_N, HEAD_SIZE].
    q_full, q_empty: one barrier per half of a query tile and stage. kv_full, kv_empty: one per stage.
    num_segments: without padding. num_tiles: query tiles of all programs. HALF: which half, 0 or 1.

    In the first step of a query tile, the accumulator in flight is that of the previous tile. This is why ``row_sum``
    and ``finished*`` lag one query tile behind: they belong to the accumulator and change only after it is stored.
    Key tiles are taken from the last to the first: the first ``1 + masked_tiles`` of them need the causal mask.
    """
    HEAD_SIZE: gl.constexpr = keys.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    if not SOFT_CAP:
        scale *= LOG2_E
    # The first step of a query tile finishes the previous one. The first tile finishes one without tokens.
    weights = gl.zeros([HALF_M, BLOCK_N], gl.float32, SCORES)
    accumulator = gl.zeros([HALF_M, HEAD_SIZE], gl.float32, OUTPUT)
    row_sum = gl.full([HALF_M], 1.0, gl.float32, ROWS)
    finished = output
    finished_first = 0
    finished_tokens = 0
    key_tiles = 0  # tiles of keys so far
    query_tiles = 0  # tiles of queries so far
    turn = 0
    tile = tile_of_turn(0, num_tiles)
    segment = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)[0]
    next_start = gl.load(segment_start_loc + segment)
    next_end = gl.load(segment_start_loc + segment + 1)
    next_keys = gl.load(key_lens + segment)
    while tile < num_tiles:
        _, _, head, first_token = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)
        start = next_start
        num_tokens = next_end - next_start
        num_keys = next_keys
        # Look up the next tile now: its numbers arrive while this one is computed.
        turn += 1
        tile = tile_of_turn(turn, num_tiles)
        segment = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)[0]
        next_start = gl.load(segment_start_loc + segment)
        next_end = gl.load(segment_start_loc + segment + 1)
        next_keys = gl.load(key_lens + segment)
        end_key = tile_end_key(first_token, num_tokens, num_keys)
        if end_key > 0:
            # The last key that this half's first token sees.
            diagonal = num_keys - num_tokens + first_token + HALF * HALF_M
            last = (end_key - 1) // BLOCK_N
            # Tiles of keys of which every token of the query tile sees all keys.
            whole = (num_keys - num_tokens + first_token + 1) // BLOCK_N
            masked_tiles = gl.maximum(last - whole, 0)

            # [HALF_M, HEAD_SIZE]
            query = queries.index(stage_of(query_tiles) * CONSUMERS + HALF)
            mbarrier.wait(q_full.index(stage_of(query_tiles) * CONSUMERS + HALF), phase_of(query_tiles))
            mbarrier.wait(kv_full.index(stage_of(key_tiles)), phase_of(key_tiles))
            row_max = gl.full([HALF_M], NO_MAXIMUM, gl.float32, ROWS)
            new_row_sum = gl.zeros([HALF_M], gl.float32, ROWS)
            if sinks is not None:
                row_max = gl.full([HALF_M], LOG2_E, gl.float32, ROWS) * gl.load(sinks + head).to(gl.float32)
                new_row_sum = gl.full([HALF_M], 1.0, gl.float32, ROWS)
            weights, rescale, accumulator, row_max, new_row_sum = _attend_tile(
                query, keys, values, kv_full, kv_empty, key_tiles, diagonal - last * BLOCK_N, weights, accumulator,
                row_max, new_row_sum, scale, soft_cap, True, SOFT_CAP,
            )  # fmt: skip
            # This completed the previous query tile: accumulator, row_sum and finished* are still its own.
            _store(finished, accumulator, row_sum, finished_first, finished_tokens, output_stride_token)
            accumulator = gl.zeros([HALF_M, HEAD_SIZE], gl.float32, OUTPUT)
            row_sum = new_row_sum
            key_tiles += 1
            for masked_tile in range(masked_tiles):
                weights, rescale, accumulator, row_max, row_sum = _attend_tile(
                    query, keys, values, kv_full, kv_empty, key_tiles,
                    diagonal - (last - 1 - masked_tile) * BLOCK_N, weights, accumulator, row_max, row_sum,
                    scale, soft_cap, True, SOFT_CAP,
                )  # fmt: skip
                accumulator = _rescaled(accumulator, rescale)
                key_tiles += 1
            for _whole_tile in range(last - masked_tiles):
                weights, rescale, accumulator, row_max, row_sum = _attend_tile(
                    query, keys, values, kv_full, kv_empty, key_tiles, 0, weights, accumulator, row_max, row_sum,
                    scale, soft_cap, False, SOFT_CAP,
                )  # fmt: skip
                accumulator = _rescaled(accumulator, rescale)
                key_tiles += 1
            mbarrier.arrive(q_empty.index(stage_of(query_tiles) * CONSUMERS + HALF), count=1)
            query_tiles += 1
            finished = output + (start.to(gl.int64) * output_stride_token + head * output_stride_head)
            finished_first = first_token + HALF * HALF_M
            finished_tokens = num_tokens

    if query_tiles > 0:
        # The product that no step follows.
        WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
        last_weights = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
        accumulator = warpgroup_mma(last_weights, values.index(stage_of(key_tiles)), accumulator)
        _store(finished, accumulator, row_sum, finished_first, finished_tokens, output_stride_token)
