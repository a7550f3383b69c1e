"""The Triton plan is the torch plan, padded."""

from dataclasses import replace

import pytest
import torch
from support.paged import Request, make_step

from vllm_power.kernels.plan import VisibleBlocks, build_plan
from vllm_power.kernels.plan_gpu import PlanBuilder
from vllm_power.pattern import EVERY_ROW, PATTERN_ROWS, Pattern, RowRule, preset

BATCHES = {
    "one-token": [Request(0, 1)],
    "decodes": [Request(length, 1) for length in (0, 1, 63, 64, 65, 383, 384, 385, 1000)],
    "prefill": [Request(0, 1000)],
    "chunk-inside-a-block": [Request(70, 20)],
    "chunks": [Request(129, 300), Request(64, 64), Request(63, 2), Request(0, 65)],
    "drafts-over-a-block-end": [Request(length, 5) for length in (59, 60, 62, 63, 64, 700)],
    "mixed": [Request(900, 1), Request(127, 4), Request(0, 0), Request(500, 130), Request(0, 0)],
}


def check(
    pattern: Pattern,
    requests: list[Request],
    page_size: int,
    device: torch.device,
    rule: RowRule = PATTERN_ROWS,
) -> None:
    step = make_step(pattern, requests, page_size, heads=1, kv_heads=1, head_size=2, rule=rule)
    visible = VisibleBlocks.of(pattern, 1100)
    prompt_lens = step.prompt_lens if rule.has_dense_rows else None
    expected = build_plan(
        step.query_start_loc, step.seq_lens, step.page_table, visible, page_size, False, rule, prompt_lens
    )
    num_tokens = int(step.query_start_loc[-1])
    max_query_len = max(request.new for request in requests)

    visible = VisibleBlocks.of(pattern, 1100, device)
    builder = PlanBuilder(visible, page_size, len(requests), num_tokens + 3, rule)
    wide = torch.cat([step.page_table, step.page_table], 1).to(
        device
    )  # a table whose row stride exceeds its width
    plan = builder.build(
        step.query_start_loc.to(device),
        step.seq_lens.to(device),
        wide[:, : step.page_table.shape[1]],
        num_tokens + 3,
        max_query_len,
        None if prompt_lens is None else prompt_lens.to(device),
    )
    used = expected.capacity
    assert plan.num_segments.item() == used
    assert used <= plan.capacity <= builder.key_lens.shape[0]
    assert torch.equal(plan.segment_start_loc[: used + 1].cpu(), expected.segment_start_loc)
    assert (plan.segment_start_loc[used:] == num_tokens).all()
    assert torch.equal(plan.key_lens.cpu()[:used], expected.key_lens)
    assert not plan.key_lens[used:].any()
    columns = expected.segment_pages.shape[1]
    assert torch.equal(plan.segment_pages.cpu()[:used, :columns], expected.segment_pages)
    assert not plan.segment_pages[:used, columns:].any()
    assert not plan.segment_pages[used:].any()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("page_size", [16, 64], ids="page-{}".format)
def test_matches_the_torch_plan(batch: str, page_size: int, device: torch.device) -> None:
    check(Pattern(block_size=64), BATCHES[batch], page_size, device)


# Prompts that end before, inside and after the new tokens.
WITH_PROMPTS = [
    Request(900, 1, 890), Request(900, 1, 901), Request(900, 1, 1000), Request(127, 4, 129), Request(127, 4, 131),
    Request(0, 0, 7), Request(500, 130, 600), Request(500, 130, 630), Request(500, 130, 400), Request(0, 64, 64),
    Request(64, 200, 700), Request(0, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("decode", [False, True], ids=["decode-pattern", "decode-dense"])
@pytest.mark.parametrize("tail", [0, 1, 40, 64, 200, 2000], ids="tail-{}".format)
def test_dense_rows(tail: int, decode: bool, device: torch.device) -> None:
    check(Pattern(block_size=64), WITH_PROMPTS, 32, device, RowRule(tail, decode))


@pytest.mark.parametrize("decode", [False, True], ids=["decode-pattern", "decode-dense"])
@pytest.mark.parametrize("tail", [0, 40], ids="tail-{}".format)
def test_requests_all_of_whose_rows_see_everything(tail: int, decode: bool, device: torch.device) -> None:
    asking = [replace(request, prompt=EVERY_ROW) for request in WITH_PROMPTS[1::2]]
    batch = [request for pair in zip(WITH_PROMPTS[::2], asking, strict=True) for request in pair]
    check(Pattern(block_size=64), batch, 32, device, RowRule(tail, decode, True))


@pytest.mark.parametrize("name", ["sliding_window", "stride_slash", "dilated", "longnet", "full"])
def test_any_pattern(name: str, device: torch.device) -> None:
    check(preset(name, block_size=64), BATCHES["mixed"], 32, device)


def test_padded_requests_with_stale_lengths_have_no_segment(device: torch.device) -> None:
    pattern = Pattern(block_size=64)
    builder = PlanBuilder(VisibleBlocks.of(pattern, 1024, device), 64, 4, 8)
    plan = builder.build(
        query_start_loc=torch.tensor([0, 1, 2, 2, 2], dtype=torch.int32, device=device),
        seq_lens=torch.tensor([5, 100, 777, 0], dtype=torch.int32, device=device),
        page_table=torch.arange(64, dtype=torch.int32, device=device).view(4, 16),
        num_tokens=4,
        max_query_len=1,
    )
    assert plan.capacity == 4
    assert plan.segment_start_loc.tolist() == [0, 1, 2, 2, 2]
    assert plan.key_lens.tolist() == [5, 100, 0, 0]
    assert plan.segment_pages[:, :3].tolist() == [[0, 0, 0], [16, 17, 0], [0, 0, 0], [0, 0, 0]]


def test_a_plan_reuses_its_buffers(device: torch.device) -> None:
    builder = PlanBuilder(VisibleBlocks.of(Pattern(block_size=64), 1024, device), 64, 2, 8)
    one = torch.tensor([0, 1], dtype=torch.int32, device=device)
    table = torch.arange(16, dtype=torch.int32, device=device)[None]
    first = builder.build(one, torch.tensor([9], dtype=torch.int32, device=device), table, 1, 1)
    second = builder.build(one, torch.tensor([70], dtype=torch.int32, device=device), table, 1, 1)
    assert first.segment_pages.data_ptr() == second.segment_pages.data_ptr()
    assert first.key_lens.tolist() == [70]


def test_bounds_of_a_plan(device: torch.device) -> None:
    builder = PlanBuilder(VisibleBlocks.of(Pattern(), 1 << 20, device), 16, 256, 8192)
    assert builder.max_segments(64, 64, 1) == 64
    assert builder.max_segments(1, 8192, 8192) == 33
    assert builder.num_bytes < 2 << 20
    zeros = torch.zeros(1025, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="room"):
        builder.build(zeros, zeros[1:], zeros[1:, None], 1024, 1)
    with pytest.raises(ValueError, match="does not divide"):
        PlanBuilder(VisibleBlocks.of(Pattern(block_size=64), 64), 128, 1, 1)
