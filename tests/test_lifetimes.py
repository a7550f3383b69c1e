"""Lifetimes against the predicate, and against the figures of the design."""

import time
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_power import lifetimes as module
from vllm_power.lifetimes import Lifetimes, lifetimes
from vllm_power.pattern import NAMES, POWER, Pattern, preset

patterns = st.builds(
    Pattern,
    st.sampled_from(NAMES),
    sink_blocks=st.integers(0, 3) | st.integers(0, 200),
    window_blocks=st.integers(1, 20),
    stride=st.integers(1, 40),
)


@given(st.sampled_from([preset(name) for name in NAMES]) | patterns, st.integers(0, 300))
@settings(deadline=None, max_examples=150)
def test_a_block_lives_as_long_as_a_query_reads_it(pattern, last):
    lives = lifetimes(pattern, last)
    seen = {b: [q for q in range(b, last + 1) if pattern.sees(q, b)] for b in range(last + 1)}
    for q in range(last + 1):
        alive = {b for b in range(q + 1) if seen[b][-1] >= q}
        assert lives.live[q] == len(alive)
        assert alive == {b for b in range(q + 1) if lives.last_reader[b] >= q}
        assert lives.peak_from[q] == max(lives.live[q:])
        assert lives.dying_after[q] == tuple(b for b in range(last + 1) if seen[b][-1] == q)
    assert list(lives.dying_after[2:5]) == [lives.dying_after[q] for q in range(2, min(5, last + 1))]


@pytest.mark.parametrize(
    "prompt, output, share",
    [
        (131_072, 256, 0.035),
        (131_072, 1_024, 0.074),
        (131_072, 4_096, 0.195),
        (1_048_576, 256, 0.006),
        (1_048_576, 1_024, 0.013),
        (1_048_576, 4_096, 0.037),
    ],
)
def test_live_blocks_after_the_prompt(prompt, output, share):
    blocks = prompt // 256
    lives = lifetimes(POWER, (prompt + output - 1) // 256)
    assert lives.live[blocks - 1] / blocks == pytest.approx(share, abs=0.0005)


def test_peak_of_a_long_prompt_is_about_half():
    assert lifetimes(POWER, (131_072 + 1_024 - 1) // 256).peak_from[0] == 261


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [16, 64, 256])
def test_many_different_ends_take_little_memory_and_time(name, block_size):
    """Of requests near a million tokens, as a scheduler meets them: their peaks, and what dies in a chunk."""
    pattern, last = preset(name, block_size=block_size), (1 << 20) // block_size - 1
    numbers = sum(ask(pattern, last - less).size for less in range(256))
    assert 8 * numbers < 64e6
    start = time.process_time()
    for less in range(256, 512):
        ask(pattern, last - less)
    most = 0.06 if name == "stride_slash" else 0.01  # seconds; 65,536 blocks have 2,048 strides
    assert (time.process_time() - start) / 256 < most


def ask(pattern: Pattern, last: int) -> Lifetimes:
    lives = lifetimes(pattern, last)
    assert lives.peak_from[0] <= last + 1
    assert len(lives.dying_after[100:132]) == 32
    return lives


def test_the_cache_is_bounded_by_what_it_keeps(monkeypatch):
    monkeypatch.setattr(module, "MOST_NUMBERS", 10_000)
    monkeypatch.setattr(module, "_kept", OrderedDict())
    pattern = preset("stride_slash", stride=2)
    for last in range(1000, 1020):
        lifetimes(pattern, last)
    assert 1 <= len(module._kept) < 20
    assert (pattern, 1019) in module._kept
