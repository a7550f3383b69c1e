"""Recorded accuracies that later runs must not fall below: a file for continuous integration."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from vllm_power.tools.evals.figures import Figures
from vllm_power.tools.evals.settings import EvalError

DEFAULT_TOLERANCE = 0.02


class Recorded(BaseModel):
    """One accuracy; for the task ``agreement``, the share of places with the dense model's best token."""

    model_config = ConfigDict(extra="forbid")
    task: str
    length: int
    accuracy: float
    count: int


class Gate(BaseModel):
    """The file: tolerance is how far below its recorded value an accuracy may lie."""

    model_config = ConfigDict(extra="forbid")
    model: str
    tolerance: float = DEFAULT_TOLERANCE
    recorded: list[Recorded]


def measured(figures: Figures) -> list[Recorded]:
    """The accuracies of a run that a gate looks at."""
    found = [
        Recorded(task=a.task, length=a.length, accuracy=a.accuracy, count=a.count) for a in figures.accuracies
    ]
    found += [
        Recorded(task="agreement", length=a.length, accuracy=a.top1, count=a.tokens)
        for a in figures.agreements
    ]
    return found


def write(path: Path, model: str, figures: Figures) -> None:
    """Record the accuracies of a run. Keeps the tolerance of a gate that is there already.

    Raises EvalError if a question got no answer: what the model recalls is not known then.
    """
    if figures.unanswered:
        missing = sum(row.count for row in figures.unanswered)
        raise EvalError(
            f"{path} is not written, for {missing} questions got no answer: raise --thinking, and the server's "
            "--max-model-len beyond the longest of --lengths"
        )
    tolerance = read(path).tolerance if path.exists() else DEFAULT_TOLERANCE
    gate = Gate(model=model, tolerance=tolerance, recorded=measured(figures))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(gate.model_dump_json(indent=2) + "\n")


def read(path: Path) -> Gate:
    """Return a recorded gate. Raises EvalError if there is none, or if the file is not one."""
    try:
        return Gate.model_validate(json.loads(path.read_text()))
    except OSError as error:
        raise EvalError(f"there is no gate to read: {error}; --write-gate writes one") from error
    except (ValueError, ValidationError) as error:
        raise EvalError(f"{path} is no gate: {error}") from error


def fallen(gate: Gate, figures: Figures) -> list[str]:
    """A line for each recorded accuracy that this run does not reach, or did not measure in the same way.

    Empty if all is well.
    """
    now = {(figure.task, figure.length): figure for figure in measured(figures)}
    lines = []
    for before in gate.recorded:
        name = f"{before.task} at {before.length:,} tokens"
        figure = now.get((before.task, before.length))
        if figure is None:
            lines.append(f"{name}: recorded {before.accuracy:.1%}, not measured in this run")
        elif figure.count != before.count:
            lines.append(
                f"{name}: recorded over {before.count}, measured over {figure.count}: not comparable"
            )
        elif figure.accuracy < before.accuracy - gate.tolerance:
            lines.append(
                f"{name}: {figure.accuracy:.1%} of {figure.count}, recorded {before.accuracy:.1%}, "
                f"tolerance {gate.tolerance:.1%}"
            )
    return lines
