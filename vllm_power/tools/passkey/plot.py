"""Passkeys found by length, one line a training, after the paper's figure 3."""

from pathlib import Path
from typing import NamedTuple

from vllm_power.pattern import NAMES
from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.results import Row, rows


class Training(NamedTuple):
    """What tells trainings apart. seed: of weights and data; probe: the weight of the probe's loss."""

    pattern: str
    width: int
    steps: int
    seed: int
    probe: float

    @property
    def label(self) -> str:
        """In a legend; what is usual is left out."""
        text = f"{self.pattern}: width {self.width}, {self.steps:,} steps"
        text += f", seed {self.seed}" if self.seed else ""
        return text + (f", probe {self.probe:g}" if self.probe != 1 else "")


def accuracy(measured: list[Row]) -> dict[Training, dict[int, float]]:
    """{training: {context: share of right passkeys over all depths}}, each model under the pattern of its training.

    Of rows for the same training, context and depth the last counts.
    """
    last = {
        (Training(*(row[name] for name in Training._fields)), row["context"], row["depth"]): row
        for row in measured
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
    """Draw ``folder``/passkey.svg from ``folder``/passkey.jsonl. Raises ValueError where there are no rows.

    Trainings under one pattern have its colour, and dashes but for the first.
    """
    found = accuracy(rows(folder, "passkey"))
    if not found:
        raise ValueError(f"{folder} has no passkey.jsonl with rows of a training under its own pattern")
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
            label=training.label,
        )
    axes.set(xlabel="context, tokens", ylabel="passkeys found, %", title="Passkeys that small models find")
    axes.set_xscale("log", base=2)
    contexts = sorted({context for shares in found.values() for context in shares})
    axes.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return save(figure, folder / "passkey.svg")
