"""``vllm-power bench turns``: two engines alternate on one GPU, so that heat, clocks and the host affect both equally.

``bench serve`` measures one backend after the other, which is too coarse for differences of a few percent. Each pair is
a backend under test and vLLM's FlashAttention, each in its own process with half of the GPU's memory.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vllm_power.tools.bench.engine import CHUNK, QWEN2_7B, engine, say
from vllm_power.tools.bench.serve import decode_times, first_token_time
from vllm_power.tools.common import results
from vllm_power.tools.common.apart import ChildFailed
from vllm_power.tools.common.vllm_server import stop

COMPARED = ("training_free_all_sparse", "training_free", "power")
PROMPTS = (512, 768, 1_024, 1_536, 2_048, 4_096, 8_192, 32_768, 131_072)
# (batch, context); 262,144 tokens of Qwen2-7B's shape fit into half of a GPU of 80 GB
DECODES = (
    *((1, context) for context in (512, 2_048, 8_192, 32_768, 131_072)),
    *((8, context) for context in (512, 2_048, 8_192, 32_768)),
    *((32, context) for context in (512, 1_024, 2_048, 8_192)),
)
NEW_TOKENS = 32
# Turns, and prompts (or batches that decode) per turn.
TURNS, PER_TURN = 4, 10
LONG = 32_768  # tokens from which on a turn has one prompt or batch


class Side:
    """An engine in its own process: ``ask`` starts a measurement, ``times`` waits for its result in ms."""

    def __init__(self, impl: str, max_model_len: int, memory: float) -> None:
        command = [sys.executable, "-P", "-m", __name__, json.dumps([impl, max_model_len, memory])]
        environment = {"VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def ask(self, kind: str, batch: int, context: int, count: int) -> None:
        assert self.process.stdin is not None
        print(json.dumps([kind, batch, context, count]), file=self.process.stdin, flush=True)

    def times(self) -> list[float]:
        """Raises ChildFailed if the process ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"times"'):
                return json.loads(line)["times"]
        raise ChildFailed(self.process.wait())

    def close(self) -> None:
        stop(self.process, grace=20)


def main(
    impls: Sequence[str] = COMPARED,
    prompts: Sequence[int] = PROMPTS,
    decodes: Sequence[tuple[int, int]] = DECODES,
    folder: Path = results.FOLDER,
) -> int:
    """Measure each of ``impls`` in alternation with dense attention, print the ratios.

    prompts: lengths of which the time to the first token is measured. decodes: (batch, context) of decode steps.
    Appends the rows of each to turns.jsonl when it is measured. Returns 0, or the status of a failed process.
    """
    here = results.machine()
    works = [("ttft", 1, context) for context in prompts]
    works += [("decode_step", batch, context) for batch, context in decodes]
    longest = max(context for _, _, context in works)
    for impl in impls:
        with ExitStack() as stack:
            try:
                sides = {}
                # One after the other: each measures the GPU's free memory while it starts.
                for name in (impl, "dense"):
                    sides[name] = Side(name, longest + 256, 0.44)
                    stack.callback(sides[name].close)
                    sides[name].ask(
                        "ttft", 1, 512, 2
                    )  # the first request compiles what warm-up did not cover
                    sides[name].times()
                for kind, batch, context in works:
                    _measure(sides, impl, kind, batch, context, folder, here)
            except ChildFailed as failure:
                say(f"{impl}: {failure}")
                return failure.status
    return 0


def _measure(
    sides: dict[str, Side], impl: str, kind: str, batch: int, context: int, folder: Path, here: dict[str, Any]
) -> None:
    count = 1 if context * batch >= LONG else PER_TURN
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(TURNS):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            sides[name].ask(kind, batch, context, count)
            times[name] += sides[name].times()
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["dense"] / medians[impl]
    shown = ", ".join(f"{name} {median:.2f} ms" for name, median in medians.items())
    say(f"{kind} {batch} x {context:,}: {shown}; {ratio:.3f}x")
    shared = {
        "bench": kind,
        "batch": batch,
        "context": context,
        "page": None,
        "dtype": "bfloat16",
        "against": impl,
    }
    rows = [
        {
            **shared,
            "impl": name,
            "n": len(found),
            "median_ms": medians[name],
            "min_ms": min(found),
            "max_ms": max(found),
        }
        for name, found in times.items()
    ]
    results.append("turns", rows, folder, here)


def _serve(impl: str, max_model_len: int, memory: float) -> None:
    """The child's side: run the measurements that the lines of stdin request."""
    settings = {
        "max_model_len": max_model_len,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": 64,
        "gpu_memory_utilization": memory,
    }
    with engine(impl, QWEN2_7B, **settings) as llm:
        for line in sys.stdin:
            kind, batch, context, count = json.loads(line)
            if kind == "ttft":
                times = [first_token_time(llm.llm_engine, context) for _ in range(count)]
            else:
                times = [
                    step
                    for _ in range(count)
                    for step in decode_times(llm.llm_engine, batch, context, NEW_TOKENS)
                ]
            print(json.dumps({"times": times}), flush=True)


if __name__ == "__main__":
    _serve(*json.loads(sys.argv[1]))
