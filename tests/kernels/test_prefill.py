"""The prefill kernel against the oracle, with NaN in every page and position it must not read, and in the output."""

import functools

import pytest
import torch
from support import harness
from support.harness import BFLOAT16, SMALL, run
from support.paged import Request, make_step

from vllm_power.kernels import launch, prefill_sm90
from vllm_power.kernels.prefill import prefill
from vllm_power.pattern import POWER, Pattern, preset

BATCHES = {
    "1-token": [Request(0, 1)],
    "63-tokens": [Request(0, 63)],
    "65-tokens": [Request(0, 65)],
    "383-tokens": [Request(0, 383)],
    "385-after-512": [Request(512, 385)],
    "inside-a-block": [Request(650, 20)],
    "mixed": [Request(900, 1), Request(127, 4), Request(0, 0), Request(500, 130), Request(0, 0)],
}


def check(requests, page_size=64, pattern=SMALL, *, device, **case) -> None:
    kernel = functools.partial(prefill, max_query_len=pattern.block_size)
    harness.check(kernel, requests, page_size, pattern, device=device, **case)


@pytest.mark.parametrize("batch", BATCHES)
def test_batches(batch: str, device: torch.device) -> None:
    check(BATCHES[batch], device=device, dtype=BFLOAT16)


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256], ids="page-{}".format)
def test_page_sizes(page_size: int, device: torch.device) -> None:
    check(
        [Request(700, 70), Request(0, 10)], page_size, Pattern(block_size=max(64, page_size)), device=device
    )


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 128, 192, 256], ids="head-{}".format)
def test_head_sizes(head_size: int, device: torch.device) -> None:
    check(
        [Request(400, 70)], 16, device=device, dtype=torch.float16, heads=2, kv_heads=1, head_size=head_size
    )


@pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8, 16], ids="group-{}".format)
def test_groups(group: int, device: torch.device) -> None:
    check([Request(440, 33)], 32, device=device, dtype=BFLOAT16, heads=2 * group, kv_heads=2)


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float16, torch.float32], ids=("bf16", "fp16", "fp32"))
@pytest.mark.parametrize("soft_cap", [0.0, 1.5], ids="cap-{}".format)
def test_dtypes_and_soft_caps(dtype: torch.dtype, soft_cap: float, device: torch.device) -> None:
    check([Request(440, 40)], device=device, dtype=dtype, soft_cap=soft_cap)


@pytest.mark.parametrize("page_size", [16, 64], ids="page-{}".format)
def test_fp8_cache(page_size: int, device: torch.device) -> None:
    check([Request(440, 40)], page_size, device=device, dtype=BFLOAT16, fp8=True)


@pytest.mark.parametrize("name", ["sliding_window", "stride_slash", "dilated", "full"])
def test_patterns(name: str, device: torch.device) -> None:
    check([Request(300, 70)], 16, preset(name, block_size=64), device=device)


@pytest.mark.parametrize("soft_cap", [0.0, 1.5], ids="cap-{}".format)
def test_attention_sinks(soft_cap: float, device: torch.device) -> None:
    check([Request(0, 1), Request(440, 90)], device=device, soft_cap=soft_cap, with_sinks=True)


def test_a_prompt_in_chunks_is_the_prompt_at_once(device: torch.device) -> None:
    step = make_step(SMALL, [Request(0, 400)], 64)
    kernel = functools.partial(prefill, max_query_len=64)
    whole = run(kernel, step, SMALL, device, scale=0.25)
    for computed, new in ((0, 130), (130, 1), (131, 200), (331, 69)):
        chunk = make_step(SMALL, [Request(0, 400)], 64)
        chunk.requests = [Request(computed, new)]
        chunk.query = chunk.query[computed : computed + new]
        chunk.query_start_loc = torch.tensor([0, new], dtype=torch.int32)
        chunk.seq_lens = torch.tensor([computed + new], dtype=torch.int32)
        part = run(kernel, chunk, SMALL, device, scale=0.25)
        torch.testing.assert_close(part, whole[computed : computed + new], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("cache", "why"),
    [((2, 2, 16, 32), "does not fit"), ((2, 3, 16, 16), "does not fit"), ((2, 3, 48, 32), "power of two")],
    ids=("heads", "head-size", "page-size"),
)
def test_refuses_what_does_not_fit(cache: tuple[int, ...], why: str, device: torch.device) -> None:
    query = torch.zeros(1, 3, 16, device=device)
    with pytest.raises(ValueError, match=why):
        prefill(query, torch.zeros(cache, device=device), query.clone(), None, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter does not know Gluon")
@pytest.mark.parametrize(
    "case",
    [{}, {"soft_cap": 1.5}, {"with_sinks": True}, {"head_size": 64}, {"head_size": 64, "with_sinks": True}],
    ids=lambda case: "-".join(case) or "plain",
)
@pytest.mark.parametrize("page_size", [16, 64, 256], ids="page-{}".format)
def test_qwen2_shape_at_full_blocks(
    page_size: int, case: dict, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    sm90 = prefill_sm90.prefill
    monkeypatch.setattr(prefill_sm90, "prefill", lambda *given: (calls.append(given), sm90(*given)))
    requests = [Request(0, 1537), Request(6143, 513), Request(4095, 1), Request(0, 0), Request(3000, 257)]
    shape = {"heads": 28, "kv_heads": 4, "head_size": 128, "dtype": BFLOAT16} | case
    check(requests, page_size, POWER, device=device, **shape)
    assert len(calls) == (torch.cuda.get_device_capability() == (9, 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter does not know Gluon")
def test_the_second_launch_of_a_variant(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is asked for the first only; both are right, each over tensors of its own."""
    monkeypatch.setattr(launch, "_compiled", {})
    for seed in (1, 2):
        requests = [Request(100 * seed, 300), Request(0, 257)]
        check(
            requests, 64, POWER, device=device, heads=28, kv_heads=4, head_size=128, dtype=BFLOAT16, seed=seed
        )
    assert len(launch._compiled) == (torch.cuda.get_device_capability() == (9, 0))
