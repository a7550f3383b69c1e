"""The part ``tier`` of ``vllm-power bench memory``: which blocks a tier below the GPU's memory must return, simulated.

The pattern tells for each block when it is read next. So the GPU could keep the blocks that are read soonest, and the
rest could wait in host memory (docs/architecture.md says what vLLM lacks for it). The simulation counts the blocks that
return, with eviction by next use and by last use.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vllm_power.pattern import POWER, Pattern
from vllm_power.tools.bench.engine import CHUNK, QWEN2_7B, kv_bytes_per_token
from vllm_power.tools.common.apart import answer
from vllm_power.tools.common.results import Row

CONTEXTS = 131_072, 1_048_576
RESIDENT = {
    "decode": (24, 32, 48, 64, 96),
    "prefill": (320, 512, 1024),
}  # blocks of one sequence in GPU memory
DECODED = 131_072  # tokens of an answer, so that single blocks weigh little
NEVER = 1 << 62


class Step(NamedTuple):
    """reads: the blocks that the step reads. available: those that need no load, because the step computes them."""

    reads: frozenset[int]
    available: range


def measure(part: str) -> Iterator[Row]:
    """One row per kind of work, context and number of resident blocks."""
    block_bytes = POWER.block_size * kv_bytes_per_token(QWEN2_7B)
    for context in CONTEXTS:
        for work, steps, tokens in (
            ("decode", decode(POWER, context, DECODED), DECODED),
            ("prefill", prefill(POWER, context, CHUNK), context),
        ):
            for resident in RESIDENT[work]:
                if work == "prefill" and resident * POWER.block_size >= context:
                    continue  # all of it fits
                by_next_use, by_last_use = (loads(steps, resident, known) for known in (True, False))
                yield {
                    "bench": part,
                    "impl": "power",
                    "work": work,
                    "context": context,
                    "output": DECODED if work == "decode" else 1,
                    "value": by_next_use * POWER.block_size / tokens,
                    "by_last_use": by_last_use * POWER.block_size / tokens,
                    "unit": "blocks that return from host memory per block of tokens, evicted by next use",
                    "resident_blocks": resident,
                    "bytes_per_token": round(by_next_use * block_bytes / tokens),
                    "measured_in": "a simulation of one sequence; bytes of Qwen2-7B's shape in bfloat16",
                }


def decode(pattern: Pattern, context: int, tokens: int) -> list[Step]:
    """A step for each query block after ``context`` tokens. The first has all that it reads available."""
    first = context // pattern.block_size
    blocks = range(first, first + tokens // pattern.block_size)
    steps = [Step(frozenset(pattern.visible_blocks(block)), range(block, block + 1)) for block in blocks]
    return [steps[0]._replace(available=range(first + 1)), *steps[1:]]


def prefill(pattern: Pattern, context: int, chunk: int) -> list[Step]:
    """A step for each chunk of a prompt of ``context`` tokens."""
    blocks = range(context // pattern.block_size)
    chunks = [blocks[at : at + chunk // pattern.block_size] for at in blocks[:: chunk // pattern.block_size]]
    return [
        Step(frozenset(seen for query in chunk for seen in pattern.visible_blocks(query)), chunk)
        for chunk in chunks
    ]


def loads(steps: Sequence[Step], resident: int, by_next_use: bool) -> int:
    """How many blocks return over all steps if ``resident`` blocks stay between them.

    by_next_use: evict the block that is read last in the future, which no other choice undercuts (Belady 1966);
    otherwise the one whose last read is longest ago. Raises ValueError if a step reads more blocks than fit.
    """
    if max(len(step.reads) for step in steps) > resident:
        raise ValueError(f"a step reads more than {resident} blocks")
    held: dict[int, int] = {}  # block: what it is evicted by, the largest first
    returned = 0
    for number, (step, next_reads) in enumerate(zip(steps, _next_reads(steps), strict=True)):
        returned += sum(block not in held and block not in step.available for block in step.reads)
        held |= next_reads if by_next_use else dict.fromkeys(step.reads, -number)
        idle = sorted(held.keys() - step.reads, key=held.__getitem__, reverse=True)
        for block in idle[: max(0, len(held) - resident)]:
            del held[block]
    return returned


def _next_reads(steps: Sequence[Step]) -> list[dict[int, int]]:
    """For each step, by block that it reads: the next step that reads it."""
    upcoming: dict[int, int] = {}
    found = []
    for number, step in reversed(list(enumerate(steps))):
        found.append({block: upcoming.get(block, NEVER) for block in step.reads})
        upcoming |= dict.fromkeys(step.reads, number)
    return found[::-1]


if __name__ == "__main__":
    answer(measure)
