"""Run a kernel over a random step on the test device and hold it to the oracle, in the precision its dtype allows."""

import dataclasses
from collections.abc import Callable

import torch

from support.paged import Request, Step, make_step
from vllm_power.kernels.plan import Plan, VisibleBlocks
from vllm_power.kernels.plan_gpu import PlanBuilder
from vllm_power.pattern import Pattern

# Triton's interpreter multiplies bfloat16 matrices as if they were integers, so without a GPU float16 stands in.
BFLOAT16 = torch.bfloat16 if torch.cuda.is_available() else torch.float16

SMALL = Pattern(block_size=64)


def to_fp8(step: Step, k_scale: float, v_scale: float) -> Step:
    """The step with caches in float8_e4m3fn, stored divided by their scales; keys and values are what is read back."""

    def stored(tensor: torch.Tensor, scale: float) -> torch.Tensor:
        return (tensor.float() / scale).to(torch.float8_e4m3fn)

    def read(tensors: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
        return [stored(tensor, scale).float() * scale for tensor in tensors]

    return dataclasses.replace(
        step,
        key_cache=stored(step.key_cache, k_scale),
        value_cache=stored(step.value_cache, v_scale),
        keys=read(step.keys, k_scale),
        values=read(step.values, v_scale),
    )


def build(step: Step, pattern: Pattern, device: torch.device) -> Plan:
    """The step's plan, by the Triton plan kernel."""
    page_size = step.key_cache.shape[1]
    num_reqs, num_tokens = len(step.requests), step.query.shape[0]
    longest = max(request.length for request in step.requests)
    builder = PlanBuilder(VisibleBlocks.of(pattern, longest, device), page_size, num_reqs, num_tokens)
    return builder.build(
        step.query_start_loc.to(device),
        step.seq_lens.to(device),
        step.page_table.to(device),
        num_tokens,
        max(request.new for request in step.requests),
    )


def run(
    kernel: Callable[..., None], step: Step, pattern: Pattern, device: torch.device, **options
) -> torch.Tensor:
    """The kernel's output over the step, on the CPU; rows that it did not write are NaN."""
    output = torch.full_like(step.query, float("nan"), device=device)
    cache = step.kv_cache.to(device)
    kernel(step.query.to(device), cache, output, build(step, pattern, device), **options)
    return output.cpu()


def assert_accurate(
    output: torch.Tensor,
    step: Step,
    pattern: Pattern,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slack: float = 2.0,
) -> None:
    """Hold the output to float64: its largest error may be ``slack`` times that of the same attention computed plainly
    in the output's dtype, and two roundings of the largest value more."""
    expected = step.oracle(pattern, scale, soft_cap, sinks)
    plain = step.oracle(pattern, scale, soft_cap, sinks, step.query.dtype)
    allowed = slack * (plain.double() - expected).abs().max()
    allowed += 2 * torch.finfo(output.dtype).eps * expected.abs().max()
    error = (output.double() - expected).abs().max()
    assert error <= allowed, f"largest error {error:.2e}, allowed {allowed:.2e}"


def check(
    kernel: Callable[..., None],
    requests: list[Request],
    page_size: int = 64,
    pattern: Pattern = SMALL,
    *,
    device: torch.device,
    fp8: bool = False,
    soft_cap: float = 0.0,
    with_sinks: bool = False,
    **shape,
) -> None:
    """Run ``kernel`` over a random step and hold it to the oracle. shape: as for ``paged.make_step``."""
    step = make_step(pattern, requests, page_size, **shape)
    options = {}
    if fp8:
        step = to_fp8(step, 0.5, 2.0)
        options = {"k_scale": torch.tensor(0.5, device=device), "v_scale": torch.tensor(2.0, device=device)}
    sinks = torch.linspace(-1.0, 3.0, step.query.shape[1]) if with_sinks else None
    if sinks is not None:
        options["sinks"] = sinks.to(device)
    scale = step.query.shape[2] ** -0.5
    output = run(kernel, step, pattern, device, scale=scale, soft_cap=soft_cap, **options)
    assert_accurate(output, step, pattern, scale, soft_cap, sinks)
