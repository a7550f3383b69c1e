"""``vllm-power recall``: the same prompts under every setting, one engine at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_power import options
from vllm_power.tools.common import results
from vllm_power.tools.common.apart import rows_of
from vllm_power.tools.common.command_options import json_object
from vllm_power.tools.common.recall import TASKS
from vllm_power.tools.recall import report

# Where the user has not set them.
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; on a CPU vLLM would take half of the memory
}


def run(
    model: str,
    context: int = 8192,
    n: int = 100,
    tasks: tuple[str, ...] = TASKS,
    text: Path | None = None,
    power: tuple[str, ...] = (),
    engine: str | None = None,
    dense: bool = True,
    seed: int = 0,
    folder: Path = Path("recall"),
) -> list[report.Measured]:
    """Measure, print and write; arguments as in ``vllm-power recall --help``.

    Raises ValueError for options that are wrong, and ChildProcessError if an engine fails.
    """
    console = Console()
    settings = _settings(power, dense)
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"there is no task {', '.join(sorted(unknown))}; the tasks are {', '.join(TASKS)}")
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "model": model,
        "context": context,
        "n": n,
        "tasks": list(tasks),
        "text": None if text is None else str(text.resolve()),
        "seed": seed,
        "engine": json_object(engine or "{}", "--engine"),
    }
    name = Path(model).resolve().name if Path(model).is_dir() else model
    found: list[report.Measured] = []
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, console=console) as progress:
        for number, (label, options_given) in enumerate(settings, 1):
            line = progress.add_task(label, total=len(tasks) * n)
            last: dict[str, Any] = {}
            asked, log = {**job, "power": options_given}, folder / f"engine{number}.log"
            for last in rows_of(f"{__package__}.engine", asked, log=log, environment=ENVIRONMENT):
                progress.update(line, completed=last.get("done", len(tasks) * n))
            measured = report.Measured(label, last["mode"], last["options"], last["right"])
            found.append(measured)
            results.append("recall", list(_rows(name, context, seed, text, measured)), folder, last["here"])
            report.write_answers(folder / "answers.jsonl", name, measured, last["answers"])
    report.show(console, name, context, found)
    drawn = report.plot(f"{name}, {context:,} tokens", found, folder / "recall.svg")
    console.print(f"Written: {folder / 'recall.jsonl'}, {drawn}", soft_wrap=True)
    return found


def _settings(power: tuple[str, ...], dense: bool) -> list[tuple[str, dict[str, Any] | None]]:
    """(label, options of the backend or None for vLLM's own), dense first. Raises ValueError for a wrong option."""
    found: list[tuple[str, dict[str, Any] | None]] = [("dense", None)] if dense else []
    for given in power or ("{}",):
        asked = json_object(given, "--power")
        options.resolve(asked, None)  # a slip is told before an engine starts
        found.append((json.dumps(asked) if asked else "default", asked))
    return found


def _rows(
    model: str, context: int, seed: int, text: Path | None, measured: report.Measured
) -> Iterator[results.Row]:
    for task, right in measured.right.items():
        yield {
            "model": model,
            "mode": measured.mode,
            "options": measured.options,
            "task": task,
            "context": context,
            "correct": sum(right),
            "total": len(right),
            "seed": seed,
            "text": None if text is None else text.name,
        }
