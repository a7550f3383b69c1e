"""Passkeys found by length with intervals, one line per pattern over all its seeds, after the paper's figure 3."""

from pathlib import Path
from typing import NamedTuple

from vllm_power.pattern import NAMES
from vllm_power.tools.common.intervals import wilson
from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.results import Row, rows


class Training(NamedTuple):
    """What distinguishes lines of the plot. model: with its sizes; probe: the weight of the probe's loss."""

    pattern: str
    model: str
    steps: int
    probe: float


class Found(NamedTuple):
    """Passkeys found at one length, over all seeds."""

    correct: int
    total: int
    seeds: int

    @property
    def share(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, 95%, as if all passkeys were independent."""
        return wilson(self.correct, self.total)


def accuracy(measured: list[Row]) -> dict[Training, dict[int, Found]]:
    """{training: {context: what was found}} of rows with the task "passkey", each model under its own pattern.

    Of rows for the same training, seed and context the last counts.
    """
    last = {
        (Training(*(row[name] for name in Training._fields)), row["context"], row["seed"]): row
        for row in measured
        if row.get("task") == "passkey" and row["pattern"] == row["trained"]
    }
    found: dict[Training, dict[int, Found]] = {}
    for (training, context, _), row in sorted(last.items(), key=lambda item: item[0]):
        lengths = found.setdefault(training, {})
        before = lengths.get(context, Found(0, 0, 0))
        lengths[context] = Found(
            before.correct + row["correct"], before.total + row["total"], before.seeds + 1
        )
    return found


def plot(folder: Path) -> Path:
    """Draw ``folder``/passkey.svg from ``folder``/adapted.jsonl. Raises ValueError if there are no such rows.

    Trainings under one pattern have its colour, and dashes except for the first, which has the most steps.
    """
    found = accuracy(rows(folder, "adapted"))
    if not found:
        raise ValueError(f"{folder} has no adapted.jsonl with passkeys of a training under its own pattern")
    figure, axes = pyplot().subplots(figsize=(9.5, 4))
    dashes: dict[str, list[str]] = {}
    for training in sorted(found, key=lambda one: (NAMES.index(one.pattern), -one.steps, one.model)):
        left = dashes.setdefault(training.pattern, ["-", "--", ":"])
        lengths = found[training]
        shares = [each.share for each in lengths.values()]
        reach = [(each.share - each.interval[0], each.interval[1] - each.share) for each in lengths.values()]
        axes.errorbar(
            list(lengths),
            [100 * share for share in shares],
            yerr=[[100 * pair[side] for pair in reach] for side in (0, 1)],
            marker="o",
            markersize=4,
            capsize=3,
            color=f"C{NAMES.index(training.pattern)}",
            linestyle=left.pop(0) if len(left) > 1 else left[0],
            label=label(training, max(each.seeds for each in lengths.values())),
        )
    axes.set(xlabel="context, tokens", ylabel="passkeys found, %", title="Passkeys that small models find")
    axes.set_xscale("log", base=2)
    contexts = sorted({context for lengths in found.values() for context in lengths})
    axes.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return save(figure, folder / "passkey.svg")


def label(training: Training, seeds: int) -> str:
    """The text of a line in the legend."""
    width = training.model.rpartition(" ")[2]
    text = f"{training.pattern}: width {width}, {training.steps:,} steps"
    text += f", {seeds} seeds" if seeds > 1 else ""
    return text + (f", probe {training.probe:g}" if training.probe != 1 else "")
