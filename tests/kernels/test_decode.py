"""The decode kernel and its combine kernel against the oracle, with NaN in all that must not be read."""

import functools

import pytest
import torch
from support import harness
from support.harness import BFLOAT16, SMALL, assert_accurate, run
from support.paged import Request, make_step

from vllm_power.kernels import decode as decode_module
from vllm_power.kernels import tuning
from vllm_power.kernels.decode import decode, workspace_size
from vllm_power.pattern import Pattern

LENGTHS = (0, 1, 62, 63, 64, 255, 383, 384, 1022, 1023, 1024)


def check(requests, page_size=64, pattern=SMALL, *, device, splits=None, **case) -> None:
    longest = max(request.new for request in requests)
    kernel = functools.partial(decode, max_query_len=longest, num_splits=splits)
    harness.check(kernel, requests, page_size, pattern, device=device, **case)


@pytest.mark.parametrize("splits", [1, 2, 3, 8, None], ids="splits-{}".format)
def test_lengths(splits: int | None, device: torch.device) -> None:
    check([Request(length, 1) for length in LENGTHS], device=device, splits=splits, dtype=BFLOAT16)


@pytest.mark.parametrize("drafts", [1, 7])
@pytest.mark.parametrize("splits", [1, 4], ids="splits-{}".format)
def test_draft_tokens_cross_a_block(drafts: int, splits: int, device: torch.device) -> None:
    requests = [Request(length, 1 + drafts) for length in (0, 57, 60, 63, 64, 446, 700)]
    check(requests, 16, device=device, splits=splits, dtype=BFLOAT16, heads=14, kv_heads=2)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256], ids="page-{}".format)
def test_page_sizes(page_size: int, device: torch.device) -> None:
    check([Request(700, 1), Request(9, 1)], page_size, Pattern(block_size=max(64, page_size)), device=device)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 192, 256], ids="head-{}".format)
def test_head_sizes(head_size: int, device: torch.device) -> None:
    check([Request(400, 1)], 16, device=device, dtype=torch.float16, heads=2, kv_heads=1, head_size=head_size)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16], ids="group-{}".format)
def test_groups(group: int, device: torch.device) -> None:
    check([Request(440, 1)], 32, device=device, dtype=BFLOAT16, heads=2 * group, kv_heads=2)


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16, torch.float32], ids=("bf16", "fp16", "fp32"))
@pytest.mark.parametrize("soft_cap", [0.0, 1.5], ids="cap-{}".format)
def test_dtypes_and_soft_caps(dtype: torch.dtype, soft_cap: float, device: torch.device) -> None:
    check([Request(440, 2)], device=device, dtype=dtype, soft_cap=soft_cap)


@pytest.mark.parametrize("page_size", [16, 64], ids="page-{}".format)
def test_fp8_cache(page_size: int, device: torch.device) -> None:
    check([Request(440, 1)], page_size, device=device, dtype=BFLOAT16, fp8=True)


@pytest.mark.parametrize("splits", [1, 4], ids="splits-{}".format)
@pytest.mark.parametrize("soft_cap", [0.0, 1.5], ids="cap-{}".format)
def test_attention_sinks(splits: int, soft_cap: float, device: torch.device) -> None:
    requests = [Request(0, 1), Request(440, 3), Request(700, 1)]
    check(requests, 16, device=device, splits=splits, soft_cap=soft_cap, with_sinks=True, dtype=BFLOAT16)


def test_padded_requests(device: torch.device) -> None:
    check([Request(300, 1), Request(0, 0), Request(64, 1), Request(0, 0)], device=device)


def test_a_workspace_is_enough_for_any_batch(device: torch.device) -> None:
    workspace = torch.full((workspace_size(4, 2, 16, 1, device),), float("nan"), device=device)
    for batch in (1, 2, 3, 5, 9):
        step = make_step(SMALL, [Request(500 + 60 * row, 1) for row in range(batch)], 64)
        output = run(functools.partial(decode, workspace=workspace), step, SMALL, device, scale=0.25)
        assert_accurate(output, step, SMALL, 0.25)
    with pytest.raises(ValueError, match="workspace"):
        run(functools.partial(decode, workspace=workspace[:9]), step, SMALL, device, scale=0.25, num_splits=2)


def test_splits_a_small_batch_and_not_a_large_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    combines = []
    monkeypatch.setattr(decode_module, "combine", lambda *arguments, **options: combines.append(arguments))
    monkeypatch.setattr(tuning, "wanted_programs", lambda num_multiprocessors: 8)
    for batch in (1, 4):
        step = make_step(SMALL, [Request(200, 1)] * batch, 64)
        run(decode, step, SMALL, device, scale=0.25)
    assert len(combines) == 1
