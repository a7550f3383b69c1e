"""``vllm-power bench kernels``: one attention layer on the GPU, this project's kernels and their peers in one run.

Random data of Qwen2-7B's shape; medians. Prefill is a whole prompt. Decode is one new token per request, from CUDA
graphs in which layers alternate, so that keys come from memory and not from a cache. Rows go to kernels.jsonl.
"""

import statistics
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vllm_power.pattern import POWER
from vllm_power.tools.bench import kernels_peers as peers
from vllm_power.tools.bench.kernels_data import (
    Work,
    copy_bandwidth,
    make_work,
    matmul_rate,
    time_calls,
    time_graph,
)
from vllm_power.tools.common import results

CONTEXTS = (1_024, 8_192, 16_384, 131_072)
MILLION = 1 << 20
BATCHES = (1, 8, 64)
PAGES = (16, 256)
FLEX_CONTEXTS = (16_384, 131_072)  # compiled separately, which takes a while
VISIBLE_BYTES = 200 << 20  # of all layers, several times the size of a GPU's cache
CACHE_BYTES = 40 << 30


def visible_bytes(work: Work) -> int:
    """Bytes of keys and values that the last token of each request sees, in one layer."""
    blocks = len(POWER.visible_blocks((work.context - 1) // POWER.block_size))
    keys = min(work.context, blocks * POWER.block_size)
    return work.batch * keys * 2 * work.shape.kv_heads * work.shape.head_size * work.dtype.itemsize


def visible_flops(work: Work) -> int:
    """FLOPs of the visible block pairs of whole prompts, with whole diagonal blocks."""
    pairs = POWER.visible_pairs(work.context)
    return work.batch * pairs * POWER.block_size**2 * 4 * work.shape.heads * work.shape.head_size


def measure(bench: str, work: Work, peer: Callable[[Work, int], peers.Call]) -> dict[str, Any] | None:
    """One row, or None if a peer is not installed or does not support this work. Errors of our own kernel propagate."""
    try:
        calls = [peer(work, layer) for layer in range(len(work.caches))]
        if bench == "decode":
            times = time_graph(calls)
        elif work.context >= MILLION and peer is peers.dense_fa3:
            times = time_calls(calls[0], 0, 1, warm_up=0)
        else:
            times = time_calls(calls[0], 0.2)
    except (ImportError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if peer is peers.power:
            raise
        what = f"{peer.__name__}, {work.context} x {work.batch}, page {work.page}"
        cause = str(error)[-400:]  # the end of the message
        Console(stderr=True).print(f"{what}: {type(error).__name__}: {cause}")
        return None
    return {
        "bench": bench,
        "impl": peer.__name__,
        "context": work.context,
        "batch": work.batch,
        "page": work.page,
        "dtype": str(work.dtype).removeprefix("torch."),
        "median_ms": statistics.median(times),
        "n": len(times),
    }


def prefill_rows(contexts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for context in contexts:
        for page in PAGES:
            work = make_work(context, page=page)
            for peer in peers.PREFILL:
                if peer is peers.flex and (page != PAGES[-1] or context not in FLEX_CONTEXTS):
                    continue
                if peer in (peers.dense_fa3, peers.triton_dense) and page != PAGES[0]:
                    continue  # their time hardly depends on the page size
                if peer is peers.triton_dense and context >= MILLION:
                    continue
                row = measure("prefill", work, peer)
                if row:
                    yield row | {"tflops": visible_flops(work) / row["median_ms"] / 1e9}
            del work
            torch.cuda.empty_cache()


def decode_rows() -> Iterator[dict[str, Any]]:
    for context in CONTEXTS:
        for batch in BATCHES:
            for page in PAGES:
                probe = make_work(context, batch, 1, page, layers=0)
                whole = batch * context * 2 * probe.shape.kv_heads * probe.shape.head_size * 2
                layers = max(1, min(20, VISIBLE_BYTES // visible_bytes(probe), CACHE_BYTES // whole))
                work = make_work(context, batch, 1, page, layers=layers)
                for peer in peers.DECODE:
                    if peer in (peers.dense_fa3, peers.triton_dense) and page != PAGES[0]:
                        continue
                    row = measure("decode", work, peer)
                    if row:
                        yield row | {"gb_per_s": visible_bytes(work) / row["median_ms"] / 1e6}
                del work, probe
                torch.cuda.empty_cache()


def main(million: bool = True, folder: Path = results.FOLDER) -> int:
    """Measure, append each row to ``folder``/kernels.jsonl, and print the table. Returns 0.

    million: also prefill one prompt of 1,048,576 tokens, which takes a dense kernel 15 seconds.
    """
    console = Console()
    here = results.machine()
    rows = [
        {"bench": "ceiling", "impl": "copy", "tb_per_s": copy_bandwidth()},
        {"bench": "ceiling", "impl": "matmul_8192", "tflops": matmul_rate()},
    ]
    torch.cuda.empty_cache()
    results.append("kernels", rows, folder, here)
    for row in chain(decode_rows(), prefill_rows((*CONTEXTS, MILLION) if million else CONTEXTS)):
        rows.append(row)
        results.append("kernels", [row], folder, here)
        console.print(
            f"{row['bench']} {row['context']} x {row['batch']}, page {row['page']}, {row['impl']}: "
            f"{row['median_ms']:.4f} ms"
        )
    Console(width=150).print(table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> Table:
    """A line per case: ms of every kernel, and this project's speedup over dense attention."""
    names = list(dict.fromkeys(row["impl"] for row in rows if row["bench"] != "ceiling"))
    lines: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row["bench"] != "ceiling":
            key = (row["bench"], row["context"], row["batch"], row["page"])
            lines.setdefault(key, {})[row["impl"]] = row["median_ms"]
    copy, matmul = rows[0]["tb_per_s"], rows[1]["tflops"]
    shown = Table(title=f"ms; copy {copy:.2f} TB/s, bf16 matmul {matmul:.0f} TFLOP/s on this GPU")
    for column in ("bench", "context", "batch", "page", *names, "speedup"):
        shown.add_column(column, justify="right")
    for (bench, context, batch, page), times in lines.items():
        first_page = next(row["page"] for row in rows if row["bench"] != "ceiling")
        dense = lines.get((bench, context, batch, first_page), {}).get("dense_fa3")
        ratio = f"{dense / times['power']:.2f}x" if dense and "power" in times else ""
        cells = [f"{times[name]:.4f}" if name in times else "" for name in names]
        shown.add_row(bench, f"{context:,}", str(batch), str(page), *cells, ratio)
    return shown
