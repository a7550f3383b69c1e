"""Lifetimes against the predicate, and against the figures of the design."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import NAMES, POWER, preset


@given(st.sampled_from(NAMES), st.integers(0, 150))
@settings(deadline=None, max_examples=50)
def test_a_block_lives_as_long_as_a_query_reads_it(name, last):
    pattern = preset(name)
    lives = lifetimes(pattern, last)
    for q in range(last + 1):
        alive = {b for b in range(q + 1) if any(pattern.sees(later, b) for later in range(q, last + 1))}
        assert lives.live[q] == len(alive)
        assert alive == {b for b in range(q + 1) if lives.last_reader[b] >= q}
        assert lives.peak_from[q] == max(lives.live[q:])
    assert sorted(b for dying in lives.dying_after for b in dying) == list(range(last + 1))


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
