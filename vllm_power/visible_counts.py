"""How many blocks each query block sees: what the step's counters and the drawings add up."""

from vllm_power.pattern import Pattern


def visible_counts(pattern: Pattern, blocks: int) -> list[int]:
    """Visible blocks of the query blocks 0..``blocks`` - 1. The leading ones see all before them, uncounted."""
    dense = min(blocks, pattern.dense_blocks)
    return [*range(1, dense + 1), *(len(pattern.visible_blocks(q)) for q in range(dense, blocks))]
