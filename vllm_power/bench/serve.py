"""``vllm-power bench serve``: the whole engine, the pattern against vLLM's FlashAttention in one run.

Each backend runs in a process of its own, with the same random weights of a 7B shape and the same random prompts:
time to first token by prompt length, and the time of a decode step by context and batch.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_power.bench import results

QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 1_100_000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
BACKENDS = {"power": "POWER", "dense": "FLASH_ATTN"}
PROMPTS = (512, 1_024, 1_536, 2_048, 4_096, 8_192, 16_384, 32_768, 131_072)
DECODES = ((1, 512), (1, 2_048), (1, 8_192), (32, 1_024), (64, 8_192), (1, 131_072), (8, 131_072))
NEW_TOKENS = 48
CHUNK = 8_192


def run_backend(
    impl: str, prompts: list[int], decodes: list[tuple[int, int]], repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure one backend in this process; yields a row a measurement."""
    from vllm import LLM

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(QWEN2_7B))
        begin = time.perf_counter()
        llm = LLM(
            directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            attention_backend=BACKENDS[impl],
            max_model_len=max([*prompts, *(context for _, context in decodes)]) + 256,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=256,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        print(f"{impl}: engine up after {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
        engine = llm.llm_engine
        # What the first request takes beyond the others is compilation that warm-up left.
        first = 1e3 * _steps(engine, 1, 512, 1)[0][0]
        yield {"bench": "first_request", "impl": impl, "context": 512, "batch": 1, "n": 1, **_ms([first])}
        for prompt in prompts:
            # Only the last chunk of a prompt brings an output.
            times = [
                1e3 * _steps(engine, 1, prompt, 1)[0][0] for _ in range(repeats if prompt <= 32_768 else 2)
            ]
            yield {
                "bench": "ttft",
                "impl": impl,
                "context": prompt,
                "batch": 1,
                "n": len(times),
                **_ms(times),
            }
        for batch, context in decodes:
            # The first request must still be decoding when the last one's prompt is through.
            steps = _steps(engine, batch, context, NEW_TOKENS + batch * -(-context // CHUNK))
            times = [1e3 * seconds for seconds, outputs in steps if outputs == batch][2:]
            yield {
                "bench": "decode_step",
                "impl": impl,
                "context": context,
                "batch": batch,
                "n": len(times),
                **_ms(times),
            }


def _ms(times: list[float]) -> dict[str, float]:
    return {"median_ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)}


def _steps(engine: Any, batch: int, prompt: int, new_tokens: int) -> list[tuple[float, int]]:
    """Serve ``batch`` random prompts; of each step with outputs: seconds since the last one, and how many."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    for index in range(batch):
        tokens = random.choices(range(1000, 150_000), k=prompt)
        engine.add_request(f"{time.time_ns()}-{index}", {"prompt_token_ids": tokens}, sampling)
    last, intervals = time.perf_counter(), []
    while engine.has_unfinished_requests():
        if outputs := engine.step():
            now = time.perf_counter()
            intervals.append((now - last, len(outputs)))
            last = now
    return intervals


def main(
    prompts: list[int] | None = None,
    decodes: list[tuple[int, int]] | None = None,
    repeats: int = 5,
    folder: Path = results.FOLDER,
) -> int:
    """Measure every backend, print the table and append the rows to ``folder``/serve.jsonl."""
    rows = []
    for impl in BACKENDS:
        job = json.dumps([impl, prompts or list(PROMPTS), decodes or list(DECODES), repeats])
        child = subprocess.Popen(
            [sys.executable, "-m", "vllm_power.bench.serve", job],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")},
        )
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('{"bench"'):
                rows.append({**json.loads(line), "page": None, "dtype": "bfloat16"})
                print(line, end="", file=sys.stderr, flush=True)
        if child.wait():
            return child.returncode
    _print_table(rows)
    results.append("serve", rows, folder)
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
    for measured in run_backend(*json.loads(sys.argv[1])):
        print(json.dumps(measured), flush=True)
