"""``vllm-power bench cpu``: attention steps on the CPU, under the pattern and with vLLM's dense backend.

A step is what the engine does for its attention layers: it builds the metadata once (for the pattern, with the plan),
then writes the new keys and values and attends in each layer. Both backends run the same random batch in alternation.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_power.kernels.plan import VisibleBlocks, build_plan
from vllm_power.pattern import POWER
from vllm_power.tools.common import results
from vllm_power.tools.common.layer import Batch, Layer, Shape

PAGE_SIZE = 128
# Layers that share one plan: for decode as many as in a model. A prefill's plan costs almost nothing compared with a
# layer, so few layers suffice and save minutes.
DECODE_LAYERS, PREFILL_LAYERS = 24, 2


@dataclass(frozen=True)
class Case:
    """A batch, and the minimum speedup over dense attention."""

    name: str
    batch: Batch
    at_least: float | None = None

    @property
    def layers(self) -> int:
        return DECODE_LAYERS if max(self.batch.new) == 1 else PREFILL_LAYERS

    def row(self, impl: str, median_ms: float) -> dict[str, Any]:
        """A row of docs/results/cpu.jsonl for this case."""
        computed, new = self.batch.computed[0], self.batch.new[0]
        bench = "decode" if new == 1 else f"prefill_{new}" if computed else "prefill"
        context, batch = computed + new, len(self.batch.new)
        return {"bench": bench, "impl": impl, "context": context, "batch": batch, "median_ms": median_ms}


CASES = [
    Case("decode, 1 x 65,536", Batch([65_535], [1]), 10.0),
    Case("decode, 4 x 32,768", Batch([32_767] * 4, [1] * 4)),
    Case("prefill, 2,048 at 16,384", Batch([14_336], [2_048]), 4.0),
    *(Case(f"prefill, {n:,}", Batch([0], [n]), 0.95) for n in (512, 1_024, 1_536)),
    *(Case(f"decode, 1 x {n:,}", Batch([n - 1], [1]), 0.95) for n in (512, 1_024, 1_536)),
    Case("decode, 16 x 1,024", Batch([1_023] * 16, [1] * 16), 0.95),
]


def measure(runs: Sequence[Callable[[], None]], seconds: float, warm_up: int = 2) -> list[list[float]]:
    """Times of each of ``runs`` in ms, measured in alternation so that noise of the machine affects all of them."""
    for run in [*runs] * warm_up:
        run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, taken in zip(runs, times, strict=True):
            begin = time.perf_counter()
            run()
            taken.append(1e3 * (time.perf_counter() - begin))
    return times


def compare(case: Case, dense: Layer, power: Layer, seconds: float) -> tuple[float, float]:
    """Median ms of a step with ``case.layers`` layers: (dense, power)."""
    shape = dense.shape
    step = case.batch.common_metadata(PAGE_SIZE, dense.num_pages)
    tokens = step.num_actual_tokens
    dtype = getattr(torch, shape.dtype)
    sizes = [
        (tokens, heads, shape.head_size)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]
    query, key, value, output = (torch.randn(size, dtype=dtype) for size in sizes)
    runs = [
        lambda layer=layer: layer.run(step, (query, key, value, output), case.layers)
        for layer in (dense, power)
    ]
    dense_times, power_times = measure(runs, seconds)
    return statistics.median(dense_times), statistics.median(power_times)


def plan_times(seconds: float) -> list[tuple[str, float, float]]:
    """(case, median ms, limit in ms) for building a plan."""
    visible = VisibleBlocks.of(POWER, 131_072)
    rows = []
    for name, batch, allowed in (
        ("plan of 64 decodes at 32K", Batch([32_767] * 64, [1] * 64), 1.0),
        ("plan of a chunk of 8,192 at 128K", Batch([122_880], [8_192]), 2.0),
    ):
        step = batch.common_metadata(PAGE_SIZE, 64 * 256 + 1)

        def build(step: object = step) -> None:
            build_plan(step.query_start_loc, step.seq_lens, step.block_table_tensor, visible, PAGE_SIZE, True)  # type: ignore[attr-defined]

        (times,) = measure([build], seconds)
        rows.append((name, statistics.median(times), allowed))
    return rows


def main(seconds: float = 4.0, folder: Path | None = None) -> int:
    """Print the table. Returns 1 if a case misses its goal, otherwise 0.

    seconds: measuring time per case. folder: folder of the cpu.jsonl to append to; None: do not store the rows.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_power.plugin import register

    register()
    console = Console(width=110)
    shape = Shape()
    pages = 65_536 // PAGE_SIZE * 2 + 64
    dense, power = (Layer(backend, shape, pages, PAGE_SIZE) for backend in ("CPU_ATTN", "POWER"))
    table = Table(
        title=f"Attention of {DECODE_LAYERS} layers (prefill: {PREFILL_LAYERS}), {shape.heads} heads, "
        f"{shape.kv_heads} KV heads, head {shape.head_size}, "
        f"{shape.dtype}, {torch.get_num_threads()} threads"
    )
    for column in ("step", "dense ms", "power ms", "ratio", "at least", "block pairs read"):
        table.add_column(column, justify="left" if column == "step" else "right", no_wrap=True)
    missed = 0
    rows = []
    for case in track(CASES, "measuring", console=console):
        dense_ms, power_ms = compare(case, dense, power, seconds)
        ratio = dense_ms / power_ms
        rows += [case.row("dense", dense_ms), case.row("power", power_ms)]
        missed += case.at_least is not None and ratio < case.at_least
        read = pairs_read(case.batch)
        goal = f"{case.at_least:g}x" if case.at_least else ""
        table.add_row(case.name, f"{dense_ms:.2f}", f"{power_ms:.2f}", f"{ratio:.2f}x", goal, f"{read:.1%}")
    for name, milliseconds, allowed in plan_times(seconds / 2):
        missed += milliseconds > allowed
        table.add_row(name, "", f"{milliseconds:.3f}", "", f"under {allowed:g} ms", "")
    console.print(table)
    if folder is not None:
        results.append("cpu", [{**row, "page": PAGE_SIZE, "dtype": shape.dtype} for row in rows], folder)
    return int(missed > 0)


def pairs_read(batch: Batch) -> float:
    """Share of the causal block pairs that the pattern reads for the new tokens of a step."""
    read = causal = 0
    for computed, new in zip(batch.computed, batch.new, strict=True):
        for q in range(computed // POWER.block_size, POWER.num_blocks(computed + new)):
            read += len(POWER.visible_blocks(q))
            causal += q + 1
    return read / causal
