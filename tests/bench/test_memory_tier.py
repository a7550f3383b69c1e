"""The simulated tier in host memory: no choice of blocks returns fewer than eviction by next use."""

from functools import cache
from itertools import combinations

import pytest

from vllm_power.pattern import POWER, preset
from vllm_power.tools.bench import memory_tier, report_memory
from vllm_power.tools.bench.memory_tier import Step, decode, loads, prefill

SMALL = preset("power", block_size=16, window_blocks=2)


def fewest(steps: list[Step], resident: int) -> int:
    """Over every choice of what to evict."""

    @cache
    def from_step(number: int, held: frozenset[int]) -> int:
        if number == len(steps):
            return 0
        step = steps[number]
        returned = sum(block not in held and block not in step.available for block in step.reads)
        idle = held - step.reads
        kept = range(min(len(idle), resident - len(step.reads)) + 1)
        choices = (step.reads.union(chosen) for count in kept for chosen in combinations(idle, count))
        return returned + min(from_step(number + 1, choice) for choice in choices)

    return from_step(0, frozenset())


@pytest.mark.parametrize("resident", [9, 10])
def test_nothing_returns_less_than_next_use(resident: int) -> None:
    steps = decode(SMALL, 16 * 16, 16 * 12)
    best = fewest(steps, resident)
    assert loads(steps, resident, by_next_use=True) == best
    assert loads(steps, resident, by_next_use=False) > best > 0


def test_a_block_enters_for_each_distance() -> None:
    """If only what a step reads stays, each distance beyond the window lets one block in per query block."""
    steps = decode(POWER, 131_072, 65_536)
    distances = len(POWER.visible_blocks(513)) - POWER.sink_blocks - POWER.window_blocks
    resident = max(len(step.reads) for step in steps)
    assert loads(steps, resident, by_next_use=False) == distances * (len(steps) - 1)


def test_what_fits_whole_never_returns() -> None:
    steps = prefill(SMALL, 640, 64)
    assert loads(steps, 40, by_next_use=True) == loads(steps, 40, by_next_use=False) == 0


def test_a_step_must_fit() -> None:
    with pytest.raises(ValueError, match="reads more than 3 blocks"):
        loads(decode(SMALL, 320, 160), 3, by_next_use=True)


def test_rows_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_tier, "CONTEXTS", (131_072,))
    rows = list(memory_tier.measure("tier"))
    assert all(row["value"] < row["by_last_use"] for row in rows if row["work"] == "decode")
    machine = {
        "gpu": None,
        "cpu": "a CPU",
        "versions": {"vllm": "1", "torch": "2"},
        "commit": "a",
        "date": "today",
    }
    table = report_memory.table([row | machine for row in rows])
    assert table.count("| host tier, decode") == 5
    assert "% fewer than by last use" in table
