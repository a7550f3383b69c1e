"""Random attention layers over a paged KV cache on the GPU, and two ways to time kernels on them."""

import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_power.kernels.plan import Plan, VisibleBlocks, build_plan
from vllm_power.kernels.plan_gpu import PlanBuilder
from vllm_power.pattern import POWER


@dataclass(frozen=True)
class Shape:
    """Heads of a model; the default is Qwen2-7B's."""

    heads: int = 28
    kv_heads: int = 4
    head_size: int = 128

    @property
    def scale(self) -> float:
        return self.head_size**-0.5


@dataclass
class Work:
    """One step of ``batch`` requests of ``context`` tokens, ``new`` of them new, for several layers in alternation.

    With several layers, as in a model, the GPU's cache does not hold the keys of a layer until its next turn.
    caches: the KV cache of each layer in vLLM's layout, [pages, G, page_size, 2 * D].
    """

    context: int
    batch: int
    new: int
    page: int
    dtype: torch.dtype
    shape: Shape
    query: torch.Tensor
    output: torch.Tensor
    caches: list[torch.Tensor]
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor

    @functools.cached_property
    def builder(self) -> PlanBuilder:
        visible = VisibleBlocks.of(POWER, self.context, self.query.device)
        return PlanBuilder(visible, self.page, self.batch, self.batch * self.new)

    def build_plan(self) -> Plan:
        """Build the plan, as the engine does once per step."""
        return self.builder.build(
            self.query_start_loc, self.seq_lens, self.page_table, self.batch * self.new, self.new
        )

    @functools.cached_property
    def plan(self) -> Plan:
        return self.build_plan()

    @functools.cached_property
    def merged_plan(self) -> Plan:
        """The plan for kernels with any segment length: leading dense blocks in one segment, no padding."""
        visible = VisibleBlocks.of(POWER, self.context, self.query.device)
        return build_plan(self.query_start_loc, self.seq_lens, self.page_table, visible, self.page, True)


def make_work(
    context: int,
    batch: int = 1,
    new: int | None = None,
    page: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    layers: int = 1,
    shape: Shape | None = None,
) -> Work:
    """Random data, with the pages of all requests in random order. new: new tokens per request; None: all."""
    shape = shape or Shape()
    new = context if new is None else new
    pages = -(-context // page)
    device = torch.device("cuda")
    size = (batch * pages, shape.kv_heads, page, 2 * shape.head_size)
    caches = [
        torch.empty(size, dtype=torch.bfloat16, device=device).normal_().to(dtype) for _ in range(layers)
    ]
    query_dtype = torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype
    query = torch.randn(batch * new, shape.heads, shape.head_size, device=device).to(query_dtype)
    return Work(
        context=context,
        batch=batch,
        new=new,
        page=page,
        dtype=dtype,
        shape=shape,
        query=query,
        output=torch.full_like(query, float("nan")),
        caches=caches,
        query_start_loc=torch.arange(batch + 1, dtype=torch.int32, device=device) * new,
        seq_lens=torch.full((batch,), context, dtype=torch.int32, device=device),
        page_table=torch.randperm(batch * pages, device=device).int().view(batch, pages),
    )


def time_calls(
    call: Callable[[], object], seconds: float = 0.5, at_least: int = 5, warm_up: int = 2
) -> list[float]:
    """Times of one call in ms, by events. The GPU is busy before each call, which hides the CPU launch overhead."""
    for _ in range(warm_up):
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < at_least or (sum(times) < 1e3 * seconds and len(times) < 100):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def time_graph(calls: list[Callable[[], object]], seconds: float = 0.06, replays: int = 11) -> list[float]:
    """Times of a call in ms: repeats all ``calls`` in one CUDA graph; each replay gives one mean."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    (once,) = time_calls(lambda: [call() for call in calls], 0, 1)
    rounds = max(1, min(200 // len(calls), round(1e3 * seconds / replays / once)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    return [time / (len(calls) * rounds) for time in time_calls(graph.replay, 0, replays)]


def copy_bandwidth() -> float:
    """TB/s of a large copy on the device, bytes read plus bytes written."""
    source = torch.empty(2 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    milliseconds = statistics.median(time_calls(lambda: target.copy_(source)))
    return 2 * source.numel() * source.element_size() / milliseconds / 1e9


def matmul_rate() -> float:
    """TFLOP/s of a bf16 product of two random 8192 x 8192 matrices."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * 8192**3 / statistics.median(time_calls(lambda: left @ right)) / 1e9
