"""``vllm-power bench memory``: the gain and the cost of KV reclamation.

Seven parts, each in processes of its own: the pages that one request holds over time (live), the sequences that decode
at once in the same cache (concurrency), the scheduler's own time per step (scheduler), what later turns of a chat find
in the prefix cache (hits), the blocks that a tier in host memory would have to return (tier), and on a GPU, long
requests through the whole engine (throughput) and a chat's second turn from host memory (offloading). Each row is
appended to memory.jsonl when it is measured.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from vllm_power.pattern import POWER
from vllm_power.tools.bench.engine import QWEN2_7B, kv_bytes_per_token, lacks_gpu, say, say_row
from vllm_power.tools.common import results
from vllm_power.tools.common.apart import ChildFailed, rows_of
from vllm_power.tools.common.results import Row

PARTS = ("live", "concurrency", "scheduler", "hits", "tier", "throughput", "offloading")
ON_GPUS = ("throughput", "offloading")
THROUGHPUT = ("power", "power_no_reclaim", "dense")
SEQUENCES, SEQUENCE, STEPS = 256, 32_768, 600  # scheduler part: sequences, tokens per sequence, steps
ENGINE = "vllm_power.tools.bench.memory_engine"
SCHEDULER = "vllm_power.tools.bench.memory_scheduler"
OFFLOADING = "vllm_power.tools.bench.memory_offloading"
TIER = "vllm_power.tools.bench.memory_tier"


def jobs(
    part: str,
    on_gpu: bool,
    requests: int,
    context: int,
    output: int,
    cache_sequences: int,
    seconds: float,
) -> Iterator[tuple[str, tuple[object, ...]]]:
    """The processes of one part: the module to run, and its arguments."""
    if part == "live":
        for impl in ("power", "power_no_reclaim"):
            yield ENGINE, (part, impl, context, output, on_gpu)
    elif part == "concurrency":
        yield SCHEDULER, (part, [context // 4, context], output, cache_sequences)
    elif part == "scheduler":
        yield SCHEDULER, (part, SEQUENCES, SEQUENCE, STEPS)
    elif part == "hits":
        yield SCHEDULER, (part,)
    elif part == "tier":
        yield TIER, (part,)
    elif part == "offloading":
        host_gib = 2 * cache_bytes_for(1, context + output) / (1 << 30)
        for impl in THROUGHPUT:
            yield OFFLOADING, (part, impl, context, output, host_gib)
    else:
        cache_bytes = cache_bytes_for(cache_sequences, context + output) if cache_sequences else None
        for impl in THROUGHPUT:
            yield ENGINE, (part, impl, requests, context, output, cache_bytes, seconds)


def cache_bytes_for(sequences: int, tokens: int) -> int:
    """Bytes of a KV cache of Qwen2-7B's shape, 2 bytes per value, for whole sequences of ``tokens`` and a null page."""
    blocks = sequences * -(-tokens // POWER.block_size) + 1
    return blocks * POWER.block_size * kv_bytes_per_token(QWEN2_7B)


def main(
    parts: Sequence[str] = PARTS,
    requests: int = 64,
    context: int = 131_072,
    output: int = 1_024,
    cache_sequences: int = 4,
    seconds: float = 3_600,
    folder: Path = results.FOLDER,
) -> int:
    """Run ``parts``, append their rows to ``folder``/memory.jsonl and print them. Returns 0 if every process succeeds.

    cache_sequences: whole sequences that the cache of the parts concurrency and throughput holds; with 0, throughput
    uses all the memory that vLLM takes. seconds: time limit of the throughput part per implementation.
    """
    here = results.machine()
    on_gpu = here["gpu"] is not None
    rows: list[Row] = []
    failures = 0
    for part in parts:
        if part in ON_GPUS and lacks_gpu(part, "the other parts run without it"):
            failures += tuple(parts) != PARTS  # only if it was requested by name
            continue
        for module, job in jobs(part, on_gpu, requests, context, output, cache_sequences, seconds):
            say(" ".join(map(str, job)))
            try:
                for row in rows_of(module, *job):
                    say_row(row)
                    results.append("memory", [row], folder, here)
                    rows.append(row)
            except ChildFailed as failure:
                say(f"{part} {job[1]}: {failure}")
                failures += 1
    if rows:
        _print_table(rows)
    return int(failures > 0)


def _print_table(rows: list[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="KV memory")
    for column in ("what", "", "implementation", "context", "output", "value", "unit"):
        table.add_column(column, justify="right" if column in ("context", "output", "value") else "left")
    for row in rows:
        kinds = [row["work"]] if "work" in row else []
        if "prefix_caching" in row:
            kinds.append("prefix caching " + ("on" if row["prefix_caching"] else "off"))
        if row.get("truncated"):
            kinds.append("truncated")
        numbers = (f"{row['context']:,}", f"{row['output']:,}", f"{row['value']:,.4g}")
        table.add_row(row["bench"], ", ".join(kinds), row["impl"], *numbers, row["unit"])
    Console(width=130).print(table)
