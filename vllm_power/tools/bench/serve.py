"""``vllm-power bench serve``: the whole engine, under the pattern and with vLLM's FlashAttention, in one run.

Measures the time to first token by prompt length, and the time of a decode step by context and batch size. Each backend
has its own process, with random weights of a 7B shape and random prompts.
"""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_power.tools.bench.engine import (
    CHUNK,
    QWEN2_7B,
    add_requests,
    engine,
    say,
    say_row,
)
from vllm_power.tools.common import results
from vllm_power.tools.common.apart import ChildFailed, answer, rows_of

COMPARED = ("power", "dense")
# Above 512 tokens vLLM replays no CUDA graph: 640 and 768 show the CPU launch overhead.
PROMPTS = (512, 640, 768, 1_024, 1_536, 2_048, 4_096, 8_192, 16_384, 131_072)
DECODES = ((1, 512), (1, 2_048), (1, 8_192), (32, 1_024), (64, 8_192), (1, 131_072), (8, 131_072))
NEW_TOKENS = 48
# Times of about 20 ms vary by a few percent: short prompts repeat for SHORT_MS in total, at most MOST_REPEATS times.
SHORT_MS, MOST_REPEATS = 1_500, 40


def run_backend(
    impl: str, prompts: list[int], decodes: list[tuple[int, int]], repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure one backend in this process; yields one row per measurement."""
    max_model_len = max([*prompts, *(context for _, context in decodes)]) + 256
    settings = {"max_model_len": max_model_len, "max_num_batched_tokens": CHUNK, "max_num_seqs": 256}
    with engine(impl, QWEN2_7B, **settings) as llm:
        vllm = llm.llm_engine
        # The first request is slower by the compilation that warm-up did not cover.
        first = first_token_time(vllm, 512)
        yield {"bench": "first_request", "impl": impl, "context": 512, "batch": 1, "n": 1, **_ms([first])}
        for prompt in prompts:
            times: list[float] = []
            while len(times) < (repeats if prompt <= 32_768 else 3) or (
                sum(times) < SHORT_MS and len(times) < MOST_REPEATS
            ):
                times.append(first_token_time(vllm, prompt))
            yield {
                "bench": "ttft",
                "impl": impl,
                "context": prompt,
                "batch": 1,
                "n": len(times),
                **_ms(times),
            }
        for batch, context in decodes:
            times = decode_times(vllm, batch, context, NEW_TOKENS)
            yield {
                "bench": "decode_step",
                "impl": impl,
                "context": context,
                "batch": batch,
                "n": len(times),
                **_ms(times),
            }


def first_token_time(vllm: Any, prompt: int) -> float:
    """Milliseconds to the first token of a random prompt of ``prompt`` tokens."""
    return 1e3 * _steps(vllm, 1, prompt, 1)[0][0]  # only the last chunk of a prompt has an output


def decode_times(vllm: Any, batch: int, context: int, new_tokens: int) -> list[float]:
    """Milliseconds of the decode steps of ``batch`` random prompts of ``context`` tokens."""
    # The first request must still decode when the last prompt is computed.
    steps = _steps(vllm, batch, context, new_tokens + batch * -(-context // CHUNK))
    return [1e3 * seconds for seconds, outputs in steps if outputs == batch][2:]


def _ms(times: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def _steps(vllm: Any, batch: int, prompt: int, new_tokens: int) -> list[tuple[float, int]]:
    """Serve ``batch`` random prompts; per step with outputs: seconds since the previous one, number of outputs."""
    add_requests(vllm, batch, prompt, new_tokens)
    last, intervals = time.perf_counter(), []
    while vllm.has_unfinished_requests():
        if outputs := vllm.step():
            now = time.perf_counter()
            intervals.append((now - last, len(outputs)))
            last = now
    return intervals


def main(repeats: int = 5, folder: Path = results.FOLDER) -> int:
    """Measure every backend, append each row to ``folder``/serve.jsonl, and print the table.

    Returns 0, or the status of a failed process as a shell reports it.
    """
    rows = []
    here = results.machine()
    for impl in COMPARED:
        try:
            for row in rows_of(__name__, impl, PROMPTS, DECODES, repeats):
                say_row(row)
                rows.append({**row, "page": None, "dtype": "bfloat16"})
                results.append("serve", rows[-1:], folder, here)
        except ChildFailed as failure:
            say(f"{impl}: {failure}")
            return failure.status
    _print_table(rows)
    return 0


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="vLLM end to end, Qwen2-7B shape, random weights")
    for column in ("what", "batch", "context", "dense ms", "power ms", "ratio"):
        table.add_column(column, justify="right")
    times = {(row["bench"], row["batch"], row["context"], row["impl"]): row["median_ms"] for row in rows}
    for bench, batch, context, impl in times:
        if impl == "power" and (dense := times.get((bench, batch, context, "dense"))):
            power = times[bench, batch, context, impl]
            table.add_row(
                bench, str(batch), f"{context:,}", f"{dense:.2f}", f"{power:.2f}", f"{dense / power:.2f}x"
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    answer(run_backend)
