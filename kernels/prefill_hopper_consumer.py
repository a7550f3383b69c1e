"""A consumer of the Hopper prefill kernel: one warpgroup that attends with 64 query tokens of every tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from vllm_power.kernels.prefill_hopper_tiles import tile_end_key, tile_indices, tile_of_turn
from vllm_power.kernels.primitives import LOG2_E, NO_MAXIMUM


@gluon.jit
def _softmax(scores, maximum, total, scale):
    """The running softmax over scores [64, BLOCK_N]: weights, the factor for what was before, new maximum and total."""
    new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_maximum[:, None])
    decay = gl.exp2(maximum - new_maximum)
    return weights, decay, new_maximum, total * decay + gl.sum(weights, 1)


@gluon.jit
def _step(
    query, keys, values, ready, free, count, diagonal, weights, accumulator, maximum, total, scale, soft_cap,
    MASK: gl.constexpr, SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """Scores of key tile number count, while the weights of the one before it meet its values; then the softmax.

    diagonal: where MASK, the last key of the tile that the first token sees. The first keys of a query tile come here
    while the last weights of the query tile before are still to meet their values: then accumulator is that tile's,
    and maximum and total have to be fresh. On entry the stage has arrived; on return the next one has.
    """
    stage = count & 1
    BLOCK_N: gl.constexpr = keys.shape[1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, accumulator.type.layout, 2)
    # [64, BLOCK_N]
    weights = gl.convert_layout(weights.to(query.dtype), WEIGHTS)
    scores = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), scores, use_acc=False, is_async=True)
    # [64, HEAD_SIZE]
    accumulator = warpgroup_mma(weights, values.index(stage), accumulator, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if SOFT_CAP:  # before the mask: a bent -inf would be a score like any other
        scores = 1.0 - 2.0 / (gl.exp2(scores * (2.0 * LOG2_E * scale / soft_cap)) + 1.0)
        scale = soft_cap * LOG2_E
    if MASK:
        # Tokens past the segment's end see keys past its keys, whatever those are: nobody reads their rows.
        visible = diagonal + gl.arange(0, 64, gl.SliceLayout(1, SCORES))
        offsets = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
        scores = gl.where(offsets[None, :] <= visible[:, None], scores, float("-inf"))
    new_weights, decay, maximum, total = _softmax(scores, maximum, total, scale)
    # Waiting for the next stage here also keeps the compiler from moving the next line before the softmax.
    mbarrier.wait(ready.index((count + 1) & 1), ((count + 1) >> 1) & 1)
    accumulator, new_weights = warpgroup_mma_wait(0, deps=[accumulator, new_weights])
    mbarrier.arrive(free.index(stage), count=1)
    return new_weights, decay, accumulator, maximum, total


@gluon.jit
def _decayed(accumulator, decay):
    return accumulator * gl.convert_layout(decay, gl.SliceLayout(1, accumulator.type.layout))[:, None]


@gluon.jit
def _store(output, accumulator, total, first_token, num_tokens, stride_token):
    """Write the finished rows of a tile; output: where its head begins in the segment's first token."""
    layout: gl.constexpr = accumulator.type.layout
    tokens = first_token + gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, accumulator.shape[1], gl.SliceLayout(0, layout))
    # [64, HEAD_SIZE]
    accumulator = _decayed(accumulator, 1.0 / total)
    pointers = output + tokens[:, None] * stride_token + columns[None, :]
    gl.store(pointers, accumulator.to(output.dtype.element_ty), mask=(tokens < num_tokens)[:, None])


@gluon.jit
def consume(
    output, queries, keys, values, query_ready, query_free, ready, free, query_start_loc, key_lens,
    sinks, num_segments, num_kv_heads, num_tiles, output_stride_token, output_stride_head, scale, soft_cap,
    GROUP: gl.constexpr, TILES: gl.constexpr, SOFT_CAP: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = keys.shape[1]
    HEAD_SIZE: gl.constexpr = keys.shape[2]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    if not SOFT_CAP:
        scale *= LOG2_E
    # What the first step of a tile finishes is the tile before. There is none yet: no tokens.
    weights = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    accumulator = gl.zeros([64, HEAD_SIZE], gl.float32, OUTPUT)
    total = gl.full([64], 1.0, gl.float32, ROWS)
    finished = output
    finished_first = 0
    finished_tokens = 0
    count = 0
    done = 0
    round = 0
    tile = tile_of_turn(0, num_tiles)
    segment = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)[0]
    next_start = gl.load(query_start_loc + segment)
    next_end = gl.load(query_start_loc + segment + 1)
    next_keys = gl.load(key_lens + segment)
    while tile < num_tiles:
        _, _, head, first_token = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)
        start = next_start
        num_tokens = next_end - next_start
        num_keys = next_keys
        # Look the next tile up now: its numbers arrive while this one is computed.
        round += 1
        tile = tile_of_turn(round, num_tiles)
        segment = tile_indices(tile, num_segments, num_kv_heads, GROUP, TILES)[0]
        next_start = gl.load(query_start_loc + segment)
        next_end = gl.load(query_start_loc + segment + 1)
        next_keys = gl.load(key_lens + segment)
        end_key = tile_end_key(first_token, num_tokens, num_keys)
        if end_key > 0:
            diagonal = (
                num_keys - num_tokens + first_token + HALF * 64
            )  # the last key that this half's first token sees
            last = (end_key - 1) // BLOCK_N
            whole = (
                num_keys - num_tokens + first_token + 1
            ) // BLOCK_N  # tiles of keys that every token sees whole
            masked_steps = gl.maximum(last - whole, 0)

            # [64, HEAD_SIZE]
            query = queries.index((done & 1) * 2 + HALF)
            mbarrier.wait(query_ready.index((done & 1) * 2 + HALF), (done >> 1) & 1)
            mbarrier.wait(ready.index(count & 1), (count >> 1) & 1)
            maximum = gl.full([64], NO_MAXIMUM, gl.float32, ROWS)
            new_total = gl.zeros([64], gl.float32, ROWS)
            if sinks is not None:
                maximum = gl.full([64], LOG2_E, gl.float32, ROWS) * gl.load(sinks + head).to(gl.float32)
                new_total = gl.full([64], 1.0, gl.float32, ROWS)
            weights, decay, accumulator, maximum, new_total = _step(
                query, keys, values, ready, free, count, diagonal - last * BLOCK_N, weights, accumulator,
                maximum, new_total, scale, soft_cap, True, SOFT_CAP,
            )  # fmt: skip
            _store(finished, accumulator, total, finished_first, finished_tokens, output_stride_token)
            accumulator = gl.zeros([64, HEAD_SIZE], gl.float32, OUTPUT)
            total = new_total
            count += 1
            for step in range(masked_steps):
                weights, decay, accumulator, maximum, total = _step(
                    query, keys, values, ready, free, count, diagonal - (last - 1 - step) * BLOCK_N, weights,
                    accumulator, maximum, total, scale, soft_cap, True, SOFT_CAP,
                )  # fmt: skip
                accumulator = _decayed(accumulator, decay)
                count += 1
            for _step_number in range(last - masked_steps):
                weights, decay, accumulator, maximum, total = _step(
                    query, keys, values, ready, free, count, 0, weights, accumulator, maximum, total,
                    scale, soft_cap, False, SOFT_CAP,
                )  # fmt: skip
                accumulator = _decayed(accumulator, decay)
                count += 1
            mbarrier.arrive(query_free.index((done & 1) * 2 + HALF), count=1)
            done += 1
            finished = output + (start.to(gl.int64) * output_stride_token + head * output_stride_head)
            finished_first = first_token + HALF * 64
            finished_tokens = num_tokens

    if done > 0:
        WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
        last_weights = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
        accumulator = warpgroup_mma(last_weights, values.index(count & 1), accumulator)
        _store(finished, accumulator, total, finished_first, finished_tokens, output_stride_token)
