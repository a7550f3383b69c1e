"""The CPU executor: vLLM's C++ kernels over the plan, in vLLM's own page format, with NaN wherever nothing may read."""

import pytest
import torch
from support.paged import Request, Step, make_step

from vllm_power.kernels.plan import VisibleBlocks, build_plan
from vllm_power.kernels.reference import attention
from vllm_power.pattern import POWER, Pattern, preset
from vllm_power.tools.common.layer import request_amx

ops = pytest.importorskip("vllm._custom_ops")
cpu_attn = pytest.importorskip("vllm.v1.attention.backends.cpu_attn")
if not hasattr(torch.ops._C, "cpu_attention_with_kv_cache"):
    pytest.skip("this vLLM has no CPU kernels", allow_module_level=True)
request_amx()


def run_cpu(step: Step, pattern: Pattern, scale: float, soft_cap: float = 0.0) -> torch.Tensor:
    """The step through vLLM's ops over the plan. The cache starts as NaN and only visible pages are filled."""
    pages, page_size, kv_heads, head_size = step.key_cache.shape
    dtype = step.query.dtype
    isa = cpu_attn._get_attn_isa(dtype, page_size, head_size)
    cache = torch.full((pages, kv_heads, 2 * page_size, head_size), float("nan"), dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    key, value = step.key_cache.flatten(0, 1), step.value_cache.flatten(0, 1)
    slots = key.isfinite().flatten(1).all(1).nonzero().flatten()
    # A page that was handed out was zeroed or overwritten before; only its own tail is arbitrary, and finite.
    for page in slots.div(page_size, rounding_mode="floor").unique():
        cache[page] = 7.0
    ops.cpu_attn_reshape_and_cache(key[slots], value[slots], key_cache, value_cache, slots, isa)
    visible = VisibleBlocks.of(pattern, max(request.length for request in step.requests))
    plan = build_plan(step.query_start_loc, step.seq_lens, step.page_table, visible, page_size, True)
    schedule = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=plan.capacity,
        num_heads=step.query.shape[1],
        num_kv_heads=kv_heads,
        head_dim=head_size,
        seq_lens=plan.key_lens,
        dtype=dtype,
        query_start_loc=plan.segment_start_loc,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )
    output = torch.full_like(step.query, float("nan"))
    ops.cpu_attention_with_kv_cache(
        query=step.query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=output,
        query_start_loc=plan.segment_start_loc,
        seq_lens=plan.key_lens,
        scale=scale,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=plan.segment_pages,
        softcap=soft_cap,
        scheduler_metadata=schedule,
        s_aux=None,
    )
    return output


def low_precision_error(step: Step, exact: torch.Tensor, scale: float, soft_cap: float) -> float:
    """What the dtype itself costs: the oracle's formula in the step's dtype, against ``exact``. The largest error."""
    from vllm_power.kernels.reference import visibility_mask

    outputs = []
    for request, start, key, value in zip(
        step.requests, step.query_start_loc, step.keys, step.values, strict=False
    ):
        mask = visibility_mask(POWER, torch.arange(request.computed, request.length), request.length)
        query = step.query[start : start + request.new]
        outputs.append(attention(query, key, value, mask, scale, soft_cap))
    return (torch.cat(outputs).double() - exact).abs().max().item()


MIXED = [
    Request(0, 700),
    Request(3000, 1),
    Request(2040, 20),
    Request(1790, 300),
    Request(4095, 1),
    Request(0, 1),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("page_size", [32, 128, 256])
@pytest.mark.parametrize("soft_cap", [0.0, 5.0], ids=["plain", "soft_cap"])
def test_mixed_step_equals_the_oracle(dtype, page_size, soft_cap):
    step = make_step(POWER, MIXED, page_size, heads=4, kv_heads=2, head_size=64, dtype=dtype)
    exact = step.oracle(POWER, 0.125, soft_cap)
    error = (run_cpu(step, POWER, 0.125, soft_cap).double() - exact).abs().max().item()
    allowed = 2 * low_precision_error(step, exact, 0.125, soft_cap) + torch.finfo(dtype).eps
    assert error <= allowed


def test_the_check_can_fail():
    step = make_step(POWER, MIXED, 128, heads=4, kv_heads=2, head_size=64)
    other = run_cpu(step, preset("power", window_blocks=3), 0.125)
    assert not (other.double() - step.oracle(POWER, 0.125)).abs().max() < 1e-3
    assert run_cpu(step, preset("full"), 0.125).isnan().any()  # dense attention reads a poisoned page
