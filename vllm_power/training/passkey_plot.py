"""Passkeys found by length, one line a pattern, after the paper's figure 3."""

import json
from pathlib import Path
from typing import Any

from vllm_power.bench.figures import pyplot, save
from vllm_power.pattern import NAMES

Row = dict[str, Any]


def accuracy(rows: list[Row]) -> dict[str, dict[int, float]]:
    """{pattern: {context: share of right passkeys over all depths}}, each model under the pattern of its training.

    Of rows for the same pattern, context and depth the last counts.
    """
    last = {
        (row["pattern"], row["context"], row["depth"]): row
        for row in rows
        if row["pattern"] == row["trained"]
    }
    sums: dict[tuple[str, int], list[int]] = {}
    for (pattern, context, _), row in last.items():
        cell = sums.setdefault((pattern, context), [0, 0])
        cell[0] += row["correct"]
        cell[1] += row["total"]
    found: dict[str, dict[int, float]] = {}
    for (pattern, context), (correct, total) in sorted(sums.items()):
        found.setdefault(pattern, {})[context] = correct / total
    return found


def plot(folder: Path) -> Path:
    """Draw ``folder``/passkey.svg from ``folder``/passkey.jsonl. Raises FileNotFoundError where there is none."""
    found = accuracy([json.loads(line) for line in (folder / "passkey.jsonl").read_text().splitlines()])
    figure, axes = pyplot().subplots(figsize=(7, 4))
    for pattern in sorted(found, key=NAMES.index):
        axes.plot(
            list(found[pattern]),
            [100 * share for share in found[pattern].values()],
            marker="o",
            label=pattern,
        )
    axes.axvline(32_768, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="context, tokens", ylabel="passkeys found, %", title="A small model, trained up to 32K")
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [2**power for power in range(10, 17)], [f"{2**power // 1024}K" for power in range(10, 17)]
    )
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, folder / "passkey.svg")
