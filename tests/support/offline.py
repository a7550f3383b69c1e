"""Compile every Triton and Gluon kernel to machine code for a GPU that is not there.

    python tests/support/offline.py 80 90 100 120

The launchers run on CPU tensors, so each kernel is compiled as it would be launched on such a GPU. Triton must not have
been imported as its interpreter, so the suite runs this as a process of its own. Needs torch and Triton, not vLLM.
"""

import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vllm_power.hf import sparse
from vllm_power.hf.tiles import WORDS, Lists
from vllm_power.kernels import decode, launch, prefill, prefill_sm90, tuning
from vllm_power.kernels.plan import Plan, VisibleBlocks
from vllm_power.kernels.plan_gpu import PlanBuilder
from vllm_power.pattern import POWER, RowRule

BFLOAT16, FP8 = torch.bfloat16, torch.float8_e4m3fn
HEADS, KV_HEADS, PAGE_SIZE = 14, 2, 256
PROCESSORS = 132  # of the imaginary GPU
compiled: list[tuple[str, float]] = []


def imagine(capability: int) -> None:
    """Have kernels compiled instead of launched, for a GPU such as 90."""
    target = GPUTarget("cuda", capability, 32)
    driver = SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    JITFunction.__getitem__ = lambda kernel, grid: lambda *a, **k: compile_kernel(kernel, grid, *a, **k)
    launch._compiled.clear()
    for module in (decode, prefill_sm90):
        module.capability = lambda device: divmod(capability, 10)
        module.num_multiprocessors = lambda device: PROCESSORS


def compile_kernel(kernel: Any, grid: Any, *arguments: Any, **options: Any) -> Any:
    begin = time.perf_counter()
    found = kernel.warmup(*arguments, grid=grid, **options)
    assert found.asm["cubin"], f"{kernel.__name__} has no machine code"
    name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
    compiled.append((name, time.perf_counter() - begin))
    return found


def serving(capability: int) -> None:
    """Compile what serves: the plan, prefill and decode."""
    plan_of_rows(RowRule(dense_tail=128, dense_decode=True))
    attend(prefill.prefill, BFLOAT16, 128, 4, 16)
    for segments in (1, 32):  # a program reads one tile of keys, or those of a split
        attend(decode.decode, BFLOAT16, 128, segments, 1)
    if capability >= 89:  # from here on Triton converts this kind of fp8
        attend(prefill.prefill, FP8, 128, 4, 16)
        attend(decode.decode, FP8, 128, 256, 1)
    if capability == 90:
        for head_size in (64, 128):
            attend(prefill.prefill, BFLOAT16, head_size, 4, tuning.SM90_MIN_QUERY_LEN)


def plan_of_rows(rule: RowRule) -> None:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    builder = PlanBuilder(VisibleBlocks.of(POWER, 8_192), PAGE_SIZE, 4, 4_096, rule)
    builder.build(ints(5), ints(4), ints(4, 32), 4_096, 1_024, ints(4))


def attend(kernel: Any, cache_dtype: Any, head_size: int, segments: int, tokens: int) -> None:
    query = torch.zeros(segments * tokens, HEADS, head_size, dtype=BFLOAT16)
    cache = torch.zeros(5, KV_HEADS, PAGE_SIZE, 2 * head_size).to(cache_dtype)
    starts, lengths, used = (torch.zeros(n, dtype=torch.int32) for n in (segments + 1, segments, 1))
    plan = Plan(starts, lengths, torch.zeros(segments, 14, dtype=torch.int32), used)
    scale = torch.ones(()) if cache_dtype == FP8 else None
    sinks = torch.zeros(HEADS, dtype=BFLOAT16)
    output = torch.empty_like(query)
    kernel(query, cache, output, plan, 0.1, 0.0, scale, scale, sinks, max_query_len=tokens)


def training() -> None:
    """Compile what trains, forward and backward."""
    states = [
        torch.zeros(1, heads, 512, 64, dtype=BFLOAT16, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    records = (torch.zeros(2, WORDS, dtype=torch.int32) for _ in range(3))
    lists = Lists(*records, torch.zeros(2, 2, dtype=torch.int32), 64, 2, False)
    sparse.attend(*states, lists, 0.1).sum().backward()


def main(capabilities: list[int]) -> None:
    for capability in capabilities:
        imagine(capability)
        serving(capability)
        training()
        print(f"sm_{capability}: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in compiled))
        compiled.clear()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
