"""Run a training: stages, progress, checkpoints, and going on after a kill."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vllm_power.pattern import preset
from vllm_power.tools.common import results as recorded
from vllm_power.tools.common.command_options import Stopped
from vllm_power.tools.passkey.eval import CONTEXTS, evaluate
from vllm_power.tools.passkey.export import export
from vllm_power.tools.passkey.settings import SIZES, Settings
from vllm_power.tools.passkey.train import Tally, Trainer

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
STEPS_BETWEEN_REPORTS = 20
SECONDS_BETWEEN_CHECKPOINTS = 60.0
PER_DEPTH = {"cuda": 20, "cpu": 3}  # passkeys for each length and depth, where the user names no number


def main(
    folder: Path,
    *,
    pattern: str,
    size: str | None,
    minutes: float | None,
    steps: int | None,
    seed: int,
    probe: float,
    results: Path,
    per_depth: int | None,
) -> None:
    """Train, export and evaluate. Raises Stopped, and ValueError for what can not run.

    size: of ``SIZES``; None is "gpu" or "cpu", as the machine has it. minutes, steps: None for the size's own.
    """
    console = Console()
    device = _device()
    size = size or ("gpu" if device.type == "cuda" else "cpu")
    if size != "gpu":
        device = torch.device("cpu")  # blocks of 16 are smaller than a GPU's tiles
    elif device.type != "cuda":
        raise ValueError("--size gpu wants an NVIDIA GPU, and there is none here")
    settings = SIZES[size]
    settings = replace(
        settings,
        pattern=pattern,
        seed=seed,
        probe=probe,
        minutes=minutes or settings.minutes,
        steps=steps or settings.steps,
    )
    trainer = train(settings, folder, device, console)
    export(trainer.model, preset(pattern, block_size=settings.block_size), folder / "model")
    _evaluate(trainer, pattern, results, per_depth, console)


def evaluate_folder(folder: Path, pattern: str | None, results: Path, per_depth: int | None) -> None:
    """Evaluate the checkpoint in ``folder`` under ``pattern`` (None: its own). Raises OSError, ValueError."""
    if pattern:
        preset(pattern)  # a wrong name, before anything is read
    trainer = Trainer.of_checkpoint(folder / CHECKPOINT, _device())
    _evaluate(trainer, pattern or trainer.settings.pattern, results, per_depth, Console())


def _evaluate(trainer: Trainer, pattern: str, results: Path, per_depth: int | None, console: Console) -> None:
    settings = trainer.settings
    per_depth = per_depth or PER_DEPTH[trainer.device.type]
    scale = (
        preset("power").block_size // settings.block_size
    )  # a toy's blocks, and so its lengths, are smaller
    for context in CONTEXTS:
        rows = list(
            evaluate(trainer, preset(pattern, block_size=settings.block_size), context // scale, per_depth)
        )
        recorded.append("passkey", rows, results)
        shares = [row["correct"] / row["total"] for row in rows]
        console.print(
            f"{pattern:>14} {context // scale:7,} tokens: {sum(shares) / len(shares):6.1%}  by depth "
            + " ".join(f"{share:.0%}" for share in shares),
            highlight=False,
            soft_wrap=True,
        )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(settings: Settings, folder: Path, device: torch.device, console: Console) -> Trainer:
    """Train to the end of ``settings``, from the checkpoint in ``folder`` where there is one.

    Writes checkpoint.pt and log.jsonl there. Raises Stopped after SIGTERM or Ctrl-C, and ValueError where the folder's
    checkpoint is of other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings, device)
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        trainer.load(checkpoint)
        console.print(f"going on at step {trainer.step} after {trainer.elapsed:.0f} s")
    _keep_log(folder / LOG, trainer.step)
    with (
        _stop_requests() as stop_requested,
        _bar(console) as show,
        (folder / LOG).open("a", buffering=1) as log,
    ):
        _loop(trainer, checkpoint, stop_requested, show, log.write)
    return trainer


def _loop(
    trainer: Trainer,
    checkpoint: Path,
    stop_requested: Callable[[], bool],
    show: Callable[[float, dict[str, Any]], None],
    write: Callable[[str], Any],
) -> None:
    settings = trainer.settings
    before, started = trainer.elapsed, time.monotonic()
    saved = started
    first = trainer.step + 1
    tally = Tally()
    while (progress := _progress(trainer)) < 1 and not stop_requested():
        trainer.train_step(progress, tally)
        # Reading the sums waits for the device; in between, the clock alone says how far this is.
        if trainer.step % STEPS_BETWEEN_REPORTS == 0:
            report = {"step": trainer.step, "progress": progress, **tally.report(settings.tokens)}
            write(json.dumps(report | {"seconds": before + time.monotonic() - started}) + "\n")
            show(progress, report)
            tally = Tally()
        if trainer.step == first:  # what it compiled does not count
            started = time.monotonic()
        trainer.elapsed = before + time.monotonic() - started
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            trainer.save(checkpoint)
            saved = time.monotonic()
    trainer.save(checkpoint)
    if progress < 1 or stop_requested():
        raise Stopped(f"stopped at step {trainer.step}; the same command goes on from {checkpoint}")


def _keep_log(log: Path, step: int) -> None:
    """Drop what was logged after the checkpoint at ``step`` and before a kill: those steps come again."""
    if log.exists():
        lines = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def _progress(trainer: Trainer) -> float:
    settings = trainer.settings
    return max(trainer.step / settings.steps, trainer.elapsed / (60 * settings.minutes))


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask for a stop after the step in progress."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(requests)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[float, dict[str, Any]], None]]:
    """A progress bar in a terminal; elsewhere a line each report."""
    columns = (BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeElapsedColumn())
    hidden = not console.is_terminal
    with Progress(*columns, TextColumn("{task.description}"), console=console, disable=hidden) as bar:
        task = bar.add_task("starting", total=1.0)

        def show(progress: float, report: dict[str, Any]) -> None:
            lengths = " ".join(f"{length}:{share:.0%}" for length, share in report["passkeys"].items())
            text = (
                f"step {report['step']} loss {report['answer_loss']:.3f} probe {report['probe']:.0%} "
                f"digits {report['digits']:.0%} passkeys {lengths} {report['tokens_per_second'] / 1e3:,.0f}K tokens/s"
            )
            bar.update(task, completed=progress, description=text)
            if hidden:
                console.print(f"{progress:4.0%} {text}", soft_wrap=True, highlight=False)

        yield show
