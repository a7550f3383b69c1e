"""What was measured on recall: as rows, as tables and as a plot."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_power.tools.calibrate.choose_recall import Step
from vllm_power.tools.calibrate.needles import Score, mean_likelihood
from vllm_power.tools.common.intervals import wilson
from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.recall import LEAST_IN_MEAN, Example

Row = dict[str, Any]


def summary(
    sets: Mapping[str, tuple[list[int] | None, list[Score]]], examples: Sequence[Example]
) -> dict[str, Row]:
    """{set: its layers, exact answers with their 95% interval, and mean likelihood} over tasks that "dense" can do.

    dense_layers is None if every row is dense. by_task: {task: (correct, total)} of all tasks.
    """
    by_task: dict[str, dict[str, list[Score]]] = {}
    for name, (_, scores) in sets.items():
        by_task[name] = defaultdict(list)
        for example, score in zip(examples, scores, strict=True):
            by_task[name][example.task].append(score)
    able = [task for task, found in by_task["dense"].items() if _exact(found) >= LEAST_IN_MEAN * len(found)]
    able = able or list(by_task["dense"])
    rows = {}
    for name, (layers, _) in sets.items():
        scores = [score for task in able for score in by_task[name][task]]
        low, high = wilson(_exact(scores), len(scores))
        rows[name] = {
            "dense_layers": layers,
            "tasks": able,
            "correct": _exact(scores),
            "total": len(scores),
            "interval": [low, high],
            "likelihood": mean_likelihood(scores),
            "by_task": {task: (_exact(found), len(found)) for task, found in by_task[name].items()},
        }
    return rows


def step_row(step: Step) -> Row:
    """A step of the choice, as a row."""
    return {
        "layer": step.layer,
        "likelihood": step.likelihood,
        "exact": step.exact,
        "tried": {str(layer): mean for layer, mean in step.tried.items()},
    }


def show(
    console: Console, steps: Sequence[Step], told: Mapping[str, Row], chosen_on: int, none_kept: float
) -> None:
    table = Table(
        caption=f"On {chosen_on} prompts that the dense model answers. Log-probability of the right answer, in nats"
    )
    for heading in ("step", "kept dense", "log-probability", "exact"):
        table.add_column(heading, justify="right")
    table.add_row("", "none", f"{none_kept:.3f}", "")
    for number, step in enumerate(steps, 1):
        table.add_row(str(number), f"+ {step.layer}", f"{step.likelihood:.3f}", f"{step.exact}/{chosen_on}")
    console.print(table)
    tasks = ", ".join(told["dense"]["tasks"])
    compared = Table(caption=f"On other prompts ({tasks}), with 95% intervals")
    for heading in ("set", "dense layers", "exact", "interval", "of dense", "log-probability"):
        compared.add_column(heading)
    for name, row in told.items():
        layers = row["dense_layers"]
        low, high = row["interval"]
        reference = told["dense"]["correct"]
        compared.add_row(
            name,
            "all" if layers is None else ", ".join(map(str, layers)),
            f"{row['correct']}/{row['total']}",
            f"{low:.3f} to {high:.3f}",
            f"{row['correct'] / reference:.1%}" if reference else "",
            f"{row['likelihood']:.3f}",
        )
    console.print(compared)


def plot(steps: Sequence[Step], told: Mapping[str, Row], none_kept: float, title: str, path: Path) -> None:
    """Above: what each layer alone brings, the proposed ones filled. Below: exact answers of each set."""
    figure, panels = pyplot().subplots(2, 1, figsize=(8, 6))
    proposed = told["proposed"]["dense_layers"]
    first = steps[0].tried if steps else {}
    layers = sorted(first)
    colours = ["tab:blue" if layer in proposed else "lightgrey" for layer in layers]
    gains = [first[layer] - none_kept for layer in layers]
    panels[0].bar([str(layer) for layer in layers], gains, color=colours, edgecolor="grey")
    panels[0].set(xlabel="layer (filled: proposed)", ylabel="gain alone, nats", title=title)
    panels[0].tick_params(axis="x", labelsize="small")
    for place, row in enumerate(told.values()):
        share = row["correct"] / row["total"]
        low, high = row["interval"]
        panels[1].bar(
            place,
            100 * share,
            yerr=[[max(0.0, 100 * (share - low))], [max(0.0, 100 * (high - share))]],
            capsize=4,
            color="tab:blue",
        )
    names = [
        name if row["dense_layers"] is None else f"{name}\n{len(row['dense_layers'])} dense layers"
        for name, row in told.items()
    ]
    panels[1].set_xticks(range(len(names)), names)
    panels[1].set(ylabel="exact answers, %", ylim=(0, 105))
    for axes in panels:
        axes.grid(axis="y", alpha=0.3)
    save(figure, path)


def _exact(scores: Sequence[Score]) -> int:
    return sum(score.exact for score in scores)
