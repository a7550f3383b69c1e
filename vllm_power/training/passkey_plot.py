"""Passkeys found by length, one line a training, after the paper's figure 3."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from vllm_power.bench.figures import pyplot, save
from vllm_power.pattern import NAMES

Row = dict[str, Any]


class Training(NamedTuple):
    """What tells trainings apart: the pattern, the model's width, how many steps."""

    pattern: str
    width: int
    steps: int


def accuracy(rows: list[Row]) -> dict[Training, dict[int, float]]:
    """{training: {context: share of right passkeys over all depths}}, each model under the pattern of its training.

    Of rows for the same training, context and depth the last counts.
    """
    last = {
        (Training(row["pattern"], row["width"], row["steps"]), row["context"], row["depth"]): row
        for row in rows
        if row["pattern"] == row["trained"]
    }
    sums: dict[tuple[Training, int], list[int]] = {}
    for (training, context, _), row in last.items():
        cell = sums.setdefault((training, context), [0, 0])
        cell[0] += row["correct"]
        cell[1] += row["total"]
    found: dict[Training, dict[int, float]] = {}
    for (training, context), (correct, total) in sorted(sums.items()):
        found.setdefault(training, {})[context] = correct / total
    return found


def plot(folder: Path) -> Path:
    """Draw ``folder``/passkey.svg from ``folder``/passkey.jsonl. Raises FileNotFoundError where there is none.

    Trainings under one pattern have its colour, and dashes but for the first.
    """
    found = accuracy([json.loads(line) for line in (folder / "passkey.jsonl").read_text().splitlines()])
    figure, axes = pyplot().subplots(figsize=(9.5, 4))
    dashes: dict[str, list[str]] = {}
    for training in sorted(found, key=lambda training: (NAMES.index(training.pattern), -training.width)):
        left = dashes.setdefault(training.pattern, ["-", "--", ":"])
        axes.plot(
            list(found[training]),
            [100 * share for share in found[training].values()],
            marker="o",
            color=f"C{NAMES.index(training.pattern)}",
            linestyle=left.pop(0) if len(left) > 1 else left[0],
            label=f"{training.pattern}: width {training.width}, {training.steps:,} steps",
        )
    axes.axvline(32_768, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="context, tokens", ylabel="passkeys found, %", title="A small model, trained up to 32K")
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        [2**power for power in range(10, 17)], [f"{2**power // 1024}K" for power in range(10, 17)]
    )
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return save(figure, folder / "passkey.svg")
