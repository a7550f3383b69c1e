"""A small step through the kernels, held to the oracle: on a GPU our Triton kernels, on a CPU the CPU executor."""

import torch

from vllm_power.kernels.reference import attention, visibility_mask
from vllm_power.pattern import POWER, Pattern

LENGTH = 2_200  # tokens: past the 1,536 that the pattern reads whole
HEADS, KV_HEADS, HEAD_SIZE, PAGE = 4, 2, 128, 128


def main() -> None:
    """Run what fits the machine and print what ran. Raises AssertionError if it is inaccurate."""
    if torch.cuda.is_available():
        error = try_triton(torch.device("cuda"), torch.bfloat16)
        print(
            f"Triton kernels on {torch.cuda.get_device_name()}, prefill and decode: largest error {error:.1e}"
        )
    else:
        print(f"CPU executor, a prompt of {LENGTH:,} tokens: largest error {try_cpu():.1e}")


def try_triton(
    device: torch.device, dtype: torch.dtype, pattern: Pattern = POWER, length: int = LENGTH
) -> float:
    """The end of a prompt through the prefill kernel and one token through the decode kernel; the largest error."""
    from vllm_power.kernels.decode import decode
    from vllm_power.kernels.plan import VisibleBlocks, build_plan
    from vllm_power.kernels.prefill import prefill

    torch.manual_seed(0)
    page = min(PAGE, pattern.block_size)
    num_pages = -(-length // page)
    pages = torch.randperm(num_pages, device=device).int()
    key, value = (torch.randn(num_pages * page, KV_HEADS, HEAD_SIZE, device=device).to(dtype) for _ in "kv")
    kv_cache = torch.empty(num_pages, KV_HEADS, page, 2 * HEAD_SIZE, dtype=dtype, device=device)
    kv_cache[pages.long()] = torch.cat([key, value], -1).unflatten(0, (num_pages, page)).transpose(1, 2)
    visible = VisibleBlocks.of(pattern, length, device)
    errors = []
    for kernel, tokens in ((prefill, pattern.block_size + 3), (decode, 1)):
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        lengths = torch.tensor([length], dtype=torch.int32, device=device)
        plan = build_plan(starts, lengths, pages[None], visible, page)
        query = torch.randn(tokens, HEADS, HEAD_SIZE, device=device).to(dtype)
        output = torch.full_like(query, float("nan"))
        longest = int(plan.segment_start_loc.diff().max())
        kernel(query, kv_cache, output, plan, HEAD_SIZE**-0.5, max_query_len=longest)
        errors.append(largest_error(output, query, key[:length], value[:length], pattern))
    return max(errors)


def try_cpu() -> float:
    """A prompt through the backend as vLLM runs it on a CPU; the largest error."""
    from vllm_power.tools.common.layer import Batch, Layer, Shape

    torch.manual_seed(0)
    num_pages = -(-LENGTH // PAGE) + 1
    shape = Shape(HEADS, KV_HEADS, HEAD_SIZE, max_model_len=4096)
    layer = Layer("power", shape, num_pages, PAGE)
    dtype = getattr(torch, shape.dtype)
    key, value = (torch.randn(LENGTH, KV_HEADS, HEAD_SIZE).to(dtype) for _ in "kv")
    step = Batch([0], [LENGTH]).common_metadata(PAGE, num_pages)
    query = torch.randn(LENGTH, HEADS, HEAD_SIZE).to(dtype)
    output = torch.full_like(query, float("nan"))
    layer.run(step, (query, key, value, output), layers=1)
    return largest_error(output, query, key, value, POWER)


def largest_error(
    output: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: Pattern
) -> float:
    """The largest error of the last tokens' attention against float64.

    Raises AssertionError if it is more than twice that of the same formula in the inputs' dtype, and two roundings.
    """
    positions = torch.arange(key.shape[0] - query.shape[0], key.shape[0], device=key.device)
    mask = visibility_mask(pattern, positions, key.shape[0])
    expected, plain = (
        attention(query.to(dtype), key.to(dtype), value.to(dtype), mask, HEAD_SIZE**-0.5).double()
        for dtype in (torch.float64, query.dtype)
    )
    allowed = 2 * (plain - expected).abs().max() + 2 * torch.finfo(query.dtype).eps * expected.abs().max()
    error = (output.double() - expected).abs().max()
    assert error <= allowed, f"largest error {error:.1e}, allowed {allowed:.1e}"
    return float(error)
