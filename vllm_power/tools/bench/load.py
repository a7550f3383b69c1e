"""``vllm-power bench serve --load``: two servers on one GPU under the load of ``vllm bench serve``, in turns.

``vllm serve`` runs twice, with a backend under test and with vLLM's FlashAttention, random weights of one shape, and a
KV cache of the same size. The servers start one after the other and then stay; while one is measured, the other idles.
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_power.tools.bench.engine import CHUNK, IMPLS, QWEN2_7B, TINY, model_folder, say
from vllm_power.tools.bench.load_client import Cell, load, write_tokenizer
from vllm_power.tools.common import failure, results
from vllm_power.tools.common.progress import Progress
from vllm_power.tools.common.results import Row
from vllm_power.tools.common.vllm_server import Server, ServerFailed, VllmMissing, serve

DENSE = "dense"
GPU_CACHE, CPU_CACHE = 18 << 30, 256 << 20  # 18 GiB: two servers of Qwen2-7B's shape on a GPU of 80 GB
GPU_SHARE = 0.45
FEWEST_PROMPTS, WARM_UP_PROMPTS, WARM_UP_TOKENS = 4, 4, 8
# {field of a row: (column of the table, whether more is better)}
SHOWN = {
    "tokens_per_s": ("tokens/s", True),
    "ttft_median_ms": ("TTFT median", False),
    "ttft_p99_ms": ("TTFT p99", False),
    "tpot_median_ms": ("TPOT median", False),
    "tpot_p99_ms": ("TPOT p99", False),
}


def main(
    cells: Sequence[Cell],
    impl: str = "power",
    turns: int = 2,
    rounds: int = 3,
    cache_bytes: int | None = None,
    folder: Path = results.FOLDER,
) -> int:
    """Measure ``cells`` in turns, append each row to ``folder``/serve.jsonl when it is measured, print the ratios.

    impl: one of ``IMPLS``, against "dense". turns: runs per cell and server. rounds: prompts per run, in multiples of
    the concurrency. cache_bytes: of each server's KV cache. Returns 0, or 1 if a server or a request fails.
    """
    here = results.machine()
    on_gpu = here["gpu"] is not None
    shape = QWEN2_7B if on_gpu else TINY
    cache_bytes = cache_bytes or (GPU_CACHE if on_gpu else CPU_CACHE)
    console = Console(stderr=True, width=110)
    rows: list[Row] = []
    try:
        with ExitStack() as stack:
            model = stack.enter_context(model_folder(shape))
            write_tokenizer(model, shape["vocab_size"])
            longest = max(cell.context + cell.output for cell in cells)
            servers: dict[str, Server] = {}
            # One after the other: each measures the GPU's free memory while it starts.
            for name in (impl, DENSE):
                say(f"{name}: starting a server")
                with Progress(console) as progress:
                    arguments = _arguments(name, longest, cache_bytes)
                    servers[name] = stack.enter_context(serve(model, *arguments, on_wait=progress))
            for index, cell in enumerate(cells):
                for row in _measure(servers, model, cell, turns, rounds, seed=1 + index * turns):
                    row |= {"against": impl, "kv_cache_bytes": cache_bytes, "dtype": shape["torch_dtype"]}
                    results.append("serve", [row], folder, here)
                    rows.append(row)
    except ServerFailed as failed:
        failure.show(console, failed)
        return 1
    except (VllmMissing, RuntimeError) as error:
        say(f"bench serve --load: {error}")
        return 1
    finally:
        if rows:
            _print_table(rows, impl)
    return 0


def _arguments(impl: str, max_model_len: int, cache_bytes: int) -> list[str]:
    """Arguments of ``vllm serve`` for one of ``IMPLS``."""
    return [
        *("--attention-backend", IMPLS[impl]["attention_backend"]),
        *("--additional-config", json.dumps(IMPLS[impl].get("additional_config", {}))),
        *("--load-format", "dummy", "--max-model-len", str(max_model_len)),
        *("--max-num-batched-tokens", str(CHUNK), "--gpu-memory-utilization", str(GPU_SHARE)),
        *("--kv-cache-memory-bytes", str(cache_bytes)),
        "--no-enable-prefix-caching",  # random prompts share nothing except by chance
        # 20 s per start, for kernels not used here.
        *("--kernel-config", json.dumps({"enable_flashinfer_autotune": False})),
    ]


def _measure(
    servers: dict[str, Server], model: str, cell: Cell, turns: int, rounds: int, seed: int
) -> Iterator[Row]:
    """Yield a row per turn and server."""
    warm_up = Cell(cell.context, min(cell.concurrency, WARM_UP_PROMPTS), min(cell.output, WARM_UP_TOKENS))
    for server in servers.values():
        load(server, model, warm_up, warm_up.concurrency, seed)
    for turn in range(turns):
        # In opposite orders, and with the same prompts for both.
        for name in list(servers)[:: 1 if turn % 2 else -1]:
            prompts = max(FEWEST_PROMPTS, rounds * cell.concurrency)
            found = load(servers[name], model, cell, prompts, seed + turn)
            say(f"{cell}, turn {turn + 1}, {name}: " + _shown(found))
            yield {
                "bench": "load",
                "impl": name,
                "mode": _mode(name),
                "context": cell.context,
                "output": cell.output,
                "batch": cell.concurrency,
                "turn": turn,
                **found,
            }


def _mode(impl: str) -> str | None:
    options: dict[str, Any] = IMPLS[impl].get("additional_config", {}).get("power", {})
    return options.get("mode")


def _shown(found: Row) -> str:
    return ", ".join(f"{name} {found[field]:,.4g}" for field, (name, _) in SHOWN.items())


def ratios(
    rows: Sequence[Row], impl: str
) -> dict[tuple[int, int, int], dict[str, tuple[float, float, float]]]:
    """{(context, output, batch): {field: (dense, ours, ratio)}}, means over the turns; a ratio above 1: ours is better.

    Cells that only one server was measured in are left out.
    """
    found = {}
    for work in dict.fromkeys((row["context"], row["output"], row["batch"]) for row in rows):
        sides = [
            [
                row
                for row in rows
                if (row["context"], row["output"], row["batch"], row["impl"]) == (*work, name)
            ]
            for name in (DENSE, impl)
        ]
        if all(sides):
            found[work] = {field: _compared(sides, field, more) for field, (_, more) in SHOWN.items()}
    return found


def _compared(sides: list[list[Row]], field: str, more_is_better: bool) -> tuple[float, float, float]:
    dense, ours = (statistics.mean(row[field] for row in side) for side in sides)
    return dense, ours, ours / dense if more_is_better else dense / ours


def _print_table(rows: Sequence[Row], impl: str) -> None:
    table = Table(title=f"vllm bench serve: FLASH_ATTN, {impl} (mode {_mode(impl)}), ratio; times in ms")
    for column in ("in", "out", "at a time", *(name for name, _ in SHOWN.values())):
        table.add_column(column, justify="right")
    for work, figures in ratios(rows, impl).items():
        shown = (f"{dense:.4g}, {ours:.4g}, {ratio:.2f}x" for dense, ours, ratio in figures.values())
        table.add_row(*(f"{number:,}" for number in work), *shown)
    Console(width=160).print(table)
