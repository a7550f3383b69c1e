"""What was recalled: as a table, with intervals and the ratio to dense, and as a plot."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_power.tools.common.intervals import wilson
from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.recall import LEAST_IN_MEAN


@dataclass(frozen=True)
class Measured:
    """One setting. options: those in force; {} for dense. right: {task: 0 or 1 per prompt}."""

    label: str
    mode: str
    options: dict[str, Any]
    right: dict[str, list[int]]

    def counts(self, tasks: list[str]) -> tuple[int, int]:
        """Correct answers and prompts of these tasks."""
        return sum(sum(self.right[task]) for task in tasks), sum(len(self.right[task]) for task in tasks)

    def share(self, tasks: list[str]) -> float:
        correct, total = self.counts(tasks)
        return correct / total


def in_mean(measured: list[Measured]) -> list[str]:
    """The tasks of the mean: those that the dense model, or without it the first setting, can do at all."""
    able = [task for task in measured[0].right if measured[0].share([task]) >= LEAST_IN_MEAN]
    return able or list(measured[0].right)


def show(console: Console, model: str, context: int, measured: list[Measured]) -> None:
    """Print a row per task and setting, and one per setting for the mean."""
    table = Table(title=f"{model}, {context:,} tokens: exact answers, 95% interval, share of dense")
    for heading in ("task", "setting", "correct", "share", "interval", "of dense"):
        table.add_column(
            heading,
            justify="left" if heading in ("task", "setting") else "right",
            no_wrap=heading == "interval",
        )
    able = in_mean(measured)
    dense = measured[0] if measured[0].mode == "dense" else None
    groups = [(task, [task]) for task in measured[0].right]
    if len(able) > 1:
        groups.append((f"mean of {', '.join(able)}", able))
    for name, tasks in groups:
        for setting in measured:
            correct, total = setting.counts(tasks)
            low, high = wilson(correct, total)
            reference = dense.share(tasks) if dense else 0.0
            table.add_row(
                name if setting is measured[0] else "",
                setting.label,
                f"{correct}/{total}",
                f"{correct / total:.3f}",
                f"{low:.2f} to {high:.2f}",
                f"{correct / total / reference:.1%}" if reference else "",
                end_section=setting is measured[-1],
            )
    console.print(table)
    for setting in measured:
        if setting.mode != "dense":
            told = json.dumps(setting.options)
            console.print(f"{setting.label}: mode {setting.mode}, {told}", soft_wrap=True, markup=False)


def plot(title: str, measured: list[Measured], path: Path) -> Path:
    """Bars by task, one per setting, with their intervals."""
    able = in_mean(measured)
    groups = [(task, [task]) for task in measured[0].right] + ([("mean", able)] if len(able) > 1 else [])
    figure, axes = pyplot().subplots(figsize=(max(6, 1.6 * len(groups)), 4 + 0.2 * len(measured)))
    width = 0.8 / len(measured)
    for number, setting in enumerate(measured):
        places, shares, below, above = [], [], [], []
        for at, (_, tasks) in enumerate(groups):
            correct, total = setting.counts(tasks)
            low, high = wilson(correct, total)
            places.append(at + (number - (len(measured) - 1) / 2) * width)
            shares.append(100 * correct / total)
            below.append(max(0.0, shares[-1] - 100 * low))
            above.append(max(0.0, 100 * high - shares[-1]))
        axes.bar(places, shares, width, yerr=(below, above), capsize=2, label=setting.label)
    axes.set_xticks(range(len(groups)), [name for name, _ in groups])
    axes.set(ylim=(0, 105), ylabel="exact answers, %", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize="small", frameon=False)
    return save(figure, path)


def write_answers(path: Path, model: str, measured: Measured, answers: list[list[str]]) -> None:
    """Append what the model said to each prompt, for a look at wrong answers."""
    with path.open("a") as file:
        for expected, said in answers:
            row = {"model": model, "setting": measured.label, "expected": expected, "said": said}
            file.write(json.dumps(row) + "\n")
