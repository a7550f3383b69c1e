"""The plan: dense causal attention over its segments is attention under the pattern, for any step."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paged import Request, Step, make_step

from vllm_power.kernels.plan import Plan, VisibleBlocks, build_plan
from vllm_power.kernels.reference import attention
from vllm_power.pattern import EVERY_ROW, NAMES, POWER, Pattern, RowRule, preset


def dense_over_plan(step: Step, plan: Plan, scale: float) -> torch.Tensor:
    """What any dense, causal, paged kernel computes when the plan's segments are its requests. [T, H, D] float64."""
    page_size = step.key_cache.shape[1]
    output = torch.full_like(step.query, float("nan"), dtype=torch.float64)
    for segment in range(plan.capacity):
        start, end = plan.segment_start_loc[segment : segment + 2].tolist()
        keys = int(plan.key_lens[segment])
        pages = plan.segment_pages[segment, : -(-keys // page_size)].long()
        key, value = (
            cache[pages].flatten(0, 1)[:keys].double() for cache in (step.key_cache, step.value_cache)
        )
        queries = end - start
        mask = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
        output[start:end] = attention(step.query[start:end].double(), key, value, mask, scale)
    return output


def check(step: Step, pattern: Pattern, merge_dense: bool) -> Plan:
    longest = max([1, *(request.length for request in step.requests)])
    visible = VisibleBlocks.of(pattern, longest)
    page_size = step.key_cache.shape[1]
    plan = build_plan(
        step.query_start_loc,
        step.seq_lens,
        step.page_table,
        visible,
        page_size,
        merge_dense,
        step.rule,
        step.prompt_lens if step.rule.has_dense_rows else None,
    )
    assert plan.segment_start_loc.dtype == plan.key_lens.dtype == plan.segment_pages.dtype == torch.int32
    expected = step.oracle(pattern, 0.25)
    torch.testing.assert_close(dense_over_plan(step, plan, 0.25), expected, rtol=1e-9, atol=1e-9)
    return plan


@st.composite
def steps(draw) -> tuple[Step, Pattern]:
    """Random steps: patterns, page sizes, lengths around every boundary, padded requests between the real ones."""
    name = draw(st.sampled_from(NAMES))
    block = draw(st.sampled_from([32, 64, 256]))
    pattern = preset(
        name, block_size=block, **({"window_blocks": draw(st.integers(1, 6))} if name == "power" else {})
    )
    page_size = draw(st.sampled_from([size for size in (16, 32, 64, 128, 256) if block % size == 0]))
    near = st.builds(lambda blocks, off: max(0, blocks * block + off), st.integers(0, 12), st.integers(-2, 2))
    lengths = st.one_of(near, st.integers(0, 12 * block))
    new = st.one_of(
        st.just(1), st.integers(1, 8), near.map(lambda n: n % (4 * block)), st.integers(0, 3 * block)
    )
    rule = RowRule(
        draw(st.sampled_from([0, 0, 1, block - 1, block, 3 * block])),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    prompts = st.one_of(lengths, st.just(EVERY_ROW)) if rule.on_request else lengths
    requests = draw(st.lists(st.builds(Request, lengths, new, prompts), min_size=1, max_size=4))
    requests = [request if request.new else Request(0, 0) for request in requests]
    if not any(request.new for request in requests):
        requests.append(Request(0, 1))
    seed = draw(st.integers(0, 1000))
    return make_step(
        pattern, requests, page_size, heads=2, kv_heads=1, head_size=8, seed=seed, rule=rule
    ), pattern


@given(steps(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_any_step_equals_the_oracle(step_and_pattern, merge_dense):
    check(*step_and_pattern, merge_dense)


def test_dense_rows_are_one_segment_over_all_pages():
    rule = RowRule(dense_tail=300, dense_decode=True)
    requests = [Request(0, 3000, prompt=3000), Request(2900, 1, prompt=3000), Request(4000, 2, prompt=3500)]
    plan = check(make_step(POWER, requests, 64, 2, 1, 8, rule=rule), POWER, merge_dense=True)
    assert plan.segment_start_loc.tolist() == [0, 1536, 1792, 2048, 2304, 2560, 2700, 3000, 3001, 3003]
    assert plan.key_lens.tolist()[-3:] == [3000, 2901, 4002]
    assert plan.segment_pages.shape[1] == -(-4002 // 64)


BOUNDARIES = [1, 2, 255, 256, 257, 511, 513, 1535, 1536, 1537, 2047, 2049, 4095, 4097]


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
def test_prefill_of_every_boundary_length(page_size):
    step = make_step(POWER, [Request(0, length) for length in BOUNDARIES[:10]], page_size, 2, 1, 8)
    check(step, POWER, merge_dense=False)


def test_decode_at_every_boundary():
    requests = [Request(length - 1, 1) for length in BOUNDARIES]
    plan = check(make_step(POWER, requests, 16, 2, 1, 8), POWER, merge_dense=False)
    assert plan.capacity == len(requests)
    assert plan.segment_pages.shape[1] == len(POWER.visible_blocks(16)) * 16


def test_draft_tokens_across_a_block_boundary_make_two_segments():
    plan = check(make_step(POWER, [Request(4 * 2048 - 2, 5)], 64, 2, 1, 8), POWER, merge_dense=False)
    assert plan.segment_start_loc.tolist() == [0, 2, 5]


def test_merging_leaves_a_short_prompt_whole():
    requests = [Request(0, 1536), Request(300, 1236), Request(0, 1537)]
    step = make_step(POWER, requests, 128, 2, 1, 8)
    assert check(step, POWER, merge_dense=True).segment_start_loc.tolist() == [0, 1536, 2772, 4308, 4309]
    assert check(step, POWER, merge_dense=False).capacity == 6 + 5 + 7


def test_full_pattern_is_the_request_itself():
    plan = check(
        make_step(preset("full"), [Request(0, 2000), Request(900, 3)], 64, 2, 1, 8), preset("full"), True
    )
    assert plan.segment_start_loc.tolist() == [0, 2000, 2003]
    assert plan.key_lens.tolist() == [2000, 903]


def test_no_requests_and_only_padded_ones():
    visible = VisibleBlocks.of(POWER, 4096)
    for rows in (0, 3):
        plan = build_plan(
            torch.zeros(rows + 1).int(), torch.zeros(rows).int(), torch.ones(rows, 16).int(), visible, 256
        )
        assert plan.capacity == 0 and plan.segment_start_loc.tolist() == [0]


def test_entries_past_the_keys_are_the_null_page():
    step = make_step(POWER, [Request(0, 3000), Request(2999, 1)], 16, 2, 1, 8)
    plan = check(step, POWER, merge_dense=False)
    used = torch.arange(plan.segment_pages.shape[1]) * 16 < plan.key_lens[:, None]
    assert (plan.segment_pages[~used] == 0).all() and (plan.segment_pages[used] > 0).all()


def test_page_must_divide_the_block():
    with pytest.raises(ValueError, match="page of 96 tokens does not divide a block of 256"):
        build_plan(
            torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1, 1).int(), VisibleBlocks.of(POWER, 1), 96
        )


@pytest.mark.parametrize(
    "requests, limit_ms",
    [([Request(32_767 + 64 * i, 1) for i in range(64)], 1.0), ([Request(16_384, 8_192)], 2.0)],
    ids=["64_decodes", "chunk_of_8192"],
)
def test_building_is_quick(requests, limit_ms):
    """On the page size that vLLM's CPU platform uses. The best of many runs: a shared core may stall."""
    visible = VisibleBlocks.of(POWER, 131_072)
    starts = torch.tensor([0, *(request.new for request in requests)]).cumsum(0).int()
    lengths = torch.tensor([request.length for request in requests]).int()
    table = torch.randint(1, 1000, (len(requests), 1024), dtype=torch.int32)
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        build_plan(starts, lengths, table, visible, 128)
        times.append(1e3 * (time.perf_counter() - begin))
    assert min(times) < limit_ms
