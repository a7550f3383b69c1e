"""Trainings under several patterns with several seeds, at equal cost: side by side on the GPUs of this machine."""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from rich.console import Console

from vllm_power.tools.common import results as recorded
from vllm_power.tools.common.command_options import Stopped
from vllm_power.tools.passkey.run import CONTEXTS, RESULTS, about, main
from vllm_power.tools.passkey.settings import Settings

Training = tuple[Settings, Path]


def all_settings(base: Settings, patterns: list[str], seeds: list[int]) -> list[Settings]:
    """``base`` under each pattern with each seed; all patterns with the first seed come first."""
    return [replace(base, pattern=pattern, seed=seed) for seed, pattern in product(seeds, patterns)]


def compare(
    each: list[Settings], folder: Path, results: Path, per_depth: int | None, jobs: int, console: Console
) -> None:
    """Train and evaluate each of ``each`` in a folder of its own in ``folder``; those with all results are skipped.

    jobs: processes per GPU. Each has its share of the trainings, one after the other, and compiles once. Raises Stopped
    if a process ended early: the same command continues.
    """
    left = [
        (settings, folder / f"{settings.pattern}-{settings.seed}")
        for settings in each
        if not is_measured(settings, results)
    ]
    console.print(f"{len(left)} of {len(each)} trainings to do")
    gpus = torch.cuda.device_count()
    processes = max(1, gpus) * jobs
    shares = [share for number in range(processes) if (share := left[number::processes])]
    if len(shares) <= 1:
        return work(left, results, per_depth)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(share, results, per_depth)) for share in shares]
    try:
        for number, worker in enumerate(workers):
            with _on_gpu(number % gpus if gpus else None):
                worker.start()
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()  # it saves a checkpoint
                worker.join()
    if failed := sum(worker.exitcode != 0 for worker in workers):
        raise Stopped(
            f"{failed} of {len(workers)} processes ended early: the same command continues from there"
        )


def is_measured(settings: Settings, results: Path) -> bool:
    """Whether there is a row for each length."""
    wanted = about(settings, settings.options(settings.block_size)) | {"task": "passkey"}
    found = {
        row["context"]
        for row in recorded.rows(results, RESULTS)
        if all(row.get(name) == value for name, value in wanted.items())
    }
    return len(found) == len(CONTEXTS)


def work(trainings: list[Training], results: Path, per_depth: int | None) -> None:
    """The trainings of one process."""
    for settings, folder in trainings:
        console = Console(highlight=False)
        console.print(f"{settings.pattern}, seed {settings.seed}")
        main(settings, folder, results, per_depth, console)


@contextmanager
def _on_gpu(number: int | None) -> Iterator[None]:
    """Processes that are started inside see only the GPU with this number, of those that are visible here."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if number is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before.split(",")[number] if before else str(number)
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif number is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
