"""The definition held to Algorithm 1, to the paper's baselines, to counts made by hand, and to its own promises."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_power.pattern import ENDLESS, NAMES, POWER, Pattern, draw, preset

PRESETS = [preset(name) for name in NAMES]
ids = [pattern.name for pattern in PRESETS]


def algorithm_1(q_token: int, k_token: int, block: int, window: int) -> bool:
    """The paper's mask (Algorithm 1, Appendix D), written down again from the paper, on tokens."""
    if k_token > q_token:
        return False
    distance = q_token // block - k_token // block
    in_window = distance < window
    power_of_two = distance & (distance - 1) == 0
    first_block = k_token < block
    return in_window or power_of_two or first_block


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_power_is_algorithm_1(window):
    block = 16
    pattern = preset("power", block_size=block, window_blocks=window)
    for q in range(
        block - 1, 80 * block, block
    ):  # the last token of a block, where causality cuts nothing off
        for k in range(0, q + 1, block):
            assert pattern.sees(q // block, k // block) == algorithm_1(q, k, block, window)


@pytest.mark.parametrize(
    "name, q, expected",
    [
        ("power", 40, [0, 8, 24, 32, 36, 37, 38, 39, 40]),
        ("sliding_window", 40, [0, *range(32, 41)]),
        ("stride_slash", 40, [0, 8, *range(35, 41)]),
        ("dilated", 40, list(range(22, 41, 2))),
        # 40 lies in segments of 8, 16, 32, 64 and 128 blocks that start at 40, 32, 32, 0 and 0; their steps are
        # 1, 2, 4, 8 and 16, and it stands on the first four of these.
        ("longnet", 40, [0, 8, 16, 24, 32, 34, 36, 38, 40]),
        ("full", 40, list(range(41))),
    ],
)
def test_one_row_by_hand(name, q, expected):
    assert list(preset(name).visible_blocks(q)) == expected


@pytest.mark.parametrize(
    "tokens, last, mean, density, layers",
    [
        (16_384, 9, 7.84, 0.2413, None),
        (32_768, 10, 8.91, 0.1382, 6),
        (131_072, 12, 10.97, 0.0428, 8),
        (1_048_576, 15, 14.00, 0.0068, 11),
    ],
)
def test_counts_of_the_default(tokens, last, mean, density, layers):
    blocks = POWER.num_blocks(tokens)
    assert len(POWER.visible_blocks(blocks - 1)) == last
    assert POWER.visible_pairs(tokens) / blocks == pytest.approx(mean, abs=0.005)
    assert POWER.density(tokens) == pytest.approx(density, abs=0.00005)
    if layers:
        assert max(POWER.hops(blocks - 1)) == layers


def test_the_paper_compares_patterns_of_equal_sparsity():
    # 0.94 at 32K (section 4.1), counted over the whole square of block pairs.
    for name in ("power", "sliding_window", "stride_slash", "dilated", "longnet"):
        assert 1 - preset(name).visible_pairs(32_768) / 128**2 == pytest.approx(0.94, abs=0.02), name


@pytest.mark.parametrize("window", [1, 5])
def test_every_token_is_reached_within_log2_layers(window):
    # Without the sink the pattern depends on the distance alone, so one search from the last block of 1M tokens
    # covers every pair of blocks up to there.
    blocks = 1_048_576 // 256
    hops = preset("power", window_blocks=window, sink_blocks=0).hops(blocks - 1)
    for distance in range(1, blocks):
        hop = hops[blocks - 1 - distance]
        assert hop is not None and hop <= math.floor(math.log2(distance)) + 1
        assert hop <= distance.bit_count()
    for layers in range(1, 13):
        assert sum(hop <= layers for hop in preset("power").hops(blocks - 1)) >= min(blocks, 2**layers)


def test_the_others_leave_holes_or_need_many_layers():
    last = 127
    assert max(preset("sliding_window", sink_blocks=0).hops(last)) == math.ceil(last / 8)
    assert all(
        hop is None for distance, hop in enumerate(reversed(preset("dilated").hops(last))) if distance % 2
    )
    assert None in preset("longnet").hops(200)


@pytest.mark.parametrize("pattern", PRESETS, ids=ids)
def test_visible_blocks_are_all_that_sees_says(pattern):
    for q in range(300):
        expected = tuple(k for k in range(q + 1) if pattern.sees(q, k))
        assert pattern.visible_blocks(q) == expected
        assert expected[-1] == q
        assert not pattern.sees(q, q + 1) and not pattern.sees(q, -1)


@pytest.mark.parametrize("pattern", PRESETS, ids=ids)
def test_dense_blocks(pattern):
    count = pattern.dense_blocks
    assert all(len(pattern.visible_blocks(q)) == q + 1 for q in range(min(count, 300)))
    if count < ENDLESS:
        assert len(pattern.visible_blocks(count)) <= count
    assert POWER.dense_tokens == 1_536


patterns = st.builds(
    Pattern,
    st.sampled_from(NAMES),
    sink_blocks=st.integers(0, 3),
    window_blocks=st.integers(1, 20),
    stride=st.integers(1, 40),
)


@given(patterns, st.integers(0, 300), st.integers(0, 300))
def test_last_reader_is_the_last_to_see_it(pattern, k, later):
    assert pattern.last_reader(k, k + later) == max(q for q in range(k, k + later + 1) if pattern.sees(q, k))


@given(patterns, st.integers(1, 60))
def test_counts_agree_with_the_predicate(pattern, blocks):
    tokens = blocks * pattern.block_size - 7
    seen = sum(pattern.sees(q, k) for q in range(blocks) for k in range(q + 1))
    assert pattern.visible_pairs(tokens) == seen
    assert pattern.density(tokens) == pytest.approx(2 * seen / (blocks * (blocks + 1)))


@given(patterns, st.integers(0, 600))
def test_counting_is_listing(pattern, q):
    assert pattern.num_visible(q) == len(pattern.visible_blocks(q))
    dense = pattern.dense_blocks
    assert all(pattern.num_visible(block) == block + 1 for block in range(min(dense, 200)))
    assert dense == ENDLESS or pattern.num_visible(dense) <= dense


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_numbers_take_little_time(name):
    """A million tokens in the smallest blocks, with every number at its largest."""
    numbers = {"sink_blocks": 4096, "window_blocks": 4096, "stride": 65_536, "block_size": 16}
    start = time.process_time()
    pattern = Pattern(name, **numbers)
    assert pattern.dense_blocks and pattern.density(1 << 20) > 0
    assert time.process_time() - start < 1.5


@given(patterns, st.integers(0, 40), st.integers(0, 5))
def test_hops_are_the_pattern_applied_layer_by_layer(pattern, q, layers):
    field = {q}
    for _ in range(layers):
        field |= {k for block in field for k in pattern.visible_blocks(block)}
    hops = pattern.hops(q)
    assert field == {k for k, hop in enumerate(hops) if hop is not None and hop <= layers}


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "powr"},
        {"block_size": 100},
        {"block_size": 8},
        {"window_blocks": 0},
        {"sink_blocks": -1},
        {"stride": 0},
        {"block_size": 1 << 70},
        {"sink_blocks": 10**12},
        {"window_blocks": 1 << 70},
        {"stride": 10**12},
    ],
)
def test_out_of_range_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields)).replace("name", "unknown pattern")):
        Pattern(**fields)


def test_drawing_shows_the_mask_and_its_counts():
    lines = draw(POWER, 16_384).splitlines()
    for q in (0, 6, 63):
        assert [i for i, mark in enumerate(lines[q]) if mark == "█"] == list(POWER.visible_blocks(q))
    assert "24.13%" in lines[-1] and "last block sees 9 blocks" in lines[-2]
    assert "never reached" in draw(preset("dilated"), 16_384)
