"""The search for a prefix hit with holes, against every possible hit tried one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_power.kv_cache_spec import PowerAttentionSpec
from vllm_power.lifetimes import lifetimes
from vllm_power.pattern import POWER, preset
from vllm_power.prefix_hits import longest_hits

BLOCKS = 40


def make_spec(pattern, max_model_len, page_size) -> PowerAttentionSpec:
    return PowerAttentionSpec(
        block_size=page_size,
        num_kv_heads=1,
        head_size=64,
        dtype=torch.float32,
        pattern=pattern,
        max_model_len=max_model_len,
        max_in_flight_tokens=0,
        lookahead_tokens=0,
    )


@given(
    name=st.sampled_from(["power", "sliding_window", "stride_slash", "dilated", "full"]),
    window=st.integers(1, 4),
    pages_per_block=st.sampled_from([1, 2, 4]),
    pages_per_hit=st.sampled_from([1, 2, 3]),
    start=st.integers(0, 4 * BLOCKS),
    missing=st.sets(st.integers(0, 4 * BLOCKS), max_size=30),
    only=st.sets(st.integers(0, 4 * BLOCKS), max_size=60),
)
def test_the_longest_hit_is_found(name, window, pages_per_block, pages_per_hit, start, missing, only):
    window = {} if name in ("stride_slash", "full") else {"window_blocks": window}
    last_reader = lifetimes(preset(name, **window), BLOCKS - 1).last_reader
    num_pages = (BLOCKS - 3) * pages_per_block
    cached = set(range(start)) - missing | only

    def valid(hit):
        needed = (p for p in range(hit) if last_reader[p // pages_per_block] >= hit // pages_per_block)
        return cached.issuperset(needed)

    valid_hits = [hit for hit in range(0, num_pages + 1, pages_per_hit) if hit == 0 or valid(hit)]
    needed_until = [(reader + 1) * pages_per_block for reader in last_reader for _ in range(pages_per_block)]
    pages, longest, before = longest_hits(
        lambda page: page if page in cached else None, num_pages, needed_until, pages_per_hit
    )
    assert longest == valid_hits[-1]
    assert before == (valid_hits[-2] if len(valid_hits) > 1 else 0)
    assert pages[:longest] == [page if page in cached else None for page in range(longest)]


@pytest.mark.parametrize("page_size", [16, 256])
def test_a_long_prompt_that_waits_costs_as_many_look_ups_as_its_hit(page_size):
    """The search runs in every step in which the prompt waits. Half of a million tokens were looked up."""
    tokens, shared = 1_000_000, 8_192
    needed_until = make_spec(POWER, tokens, page_size).needed_until(every_row=False)
    looked_up = []

    def lookup(page):
        looked_up.append(page)
        return page if page < shared // page_size else None

    _, hit, _ = longest_hits(lookup, tokens // page_size, needed_until)
    assert hit == shared // page_size
    assert len(looked_up) < hit + 10
