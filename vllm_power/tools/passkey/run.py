"""Train a small model under a pattern, write it, and measure it at every length."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from vllm_power.options import PatternOptions
from vllm_power.pattern import preset
from vllm_power.tools.common import results as recorded
from vllm_power.tools.passkey.evaluate import Evaluation, row_of
from vllm_power.tools.passkey.model import export
from vllm_power.tools.passkey.settings import SIZES, Settings
from vllm_power.tools.passkey.train import train

CONTEXTS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536)
MODEL = "model"
RESULTS = "adapted"
PER_DEPTH = 20, 3  # passkeys for each length and depth if the user gives no number: with a GPU, without


def settings_of(size: str | None, pattern: str, seed: int, probe: float, steps: int | None) -> Settings:
    """The settings of a training. size: of ``SIZES``; None: "gpu" or "cpu", as the machine has it. steps: None: the
    size's own.

    Raises ValueError for an unknown pattern, and for a size that this machine cannot train.
    """
    preset(pattern)
    size = size or ("gpu" if _has_gpu() else "cpu")
    if size == "gpu" and not _has_gpu():
        raise ValueError("--size gpu needs an NVIDIA GPU, and there is none here")
    chosen = SIZES[size]
    return replace(chosen, pattern=pattern, seed=seed, probe=probe, steps=steps or chosen.steps)


def main(settings: Settings, folder: Path, results: Path, per_depth: int | None, console: Console) -> None:
    """Train, export and evaluate, or only the rest of it if a part is done. Raises Stopped, ValueError."""
    disable_progress_bar()
    if (folder / MODEL / "config.json").exists():
        settings.check(folder)
        console.print(f"{folder / MODEL} is trained")
    else:
        model = train(settings, folder, console)
        export(model, settings.options(settings.block_size), folder / "unfinished")
        (folder / "unfinished").rename(folder / MODEL)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    evaluate(folder, None, results, per_depth, console)


def evaluate(
    folder: Path, pattern: str | None, results: Path, per_depth: int | None, console: Console
) -> None:
    """Append a row for each length to ``results``/adapted.jsonl. pattern: to run under; None: the one of the training.

    Raises OSError if there is no trained model in ``folder``, ValueError for an unknown pattern.
    """
    if pattern:
        preset(pattern)  # a wrong name, before anything is read
    settings = Settings.read(folder)
    name = pattern or settings.pattern
    options = replace(settings, pattern=name).options(settings.block_size)
    shrink = (
        preset("power").block_size // settings.block_size
    )  # a toy's blocks, and so its lengths, are smaller
    per_depth = per_depth or PER_DEPTH[0 if _has_gpu() else 1]
    found = Evaluation(folder / MODEL, options, settings.tokens, CONTEXTS[-1] // shrink)
    here = recorded.machine()
    for context in CONTEXTS:
        length = context // shrink
        correct = found.correct(length, per_depth)
        row = about(settings, options) | row_of(length, correct, per_depth)
        recorded.append(RESULTS, [row], results, here)
        low, high = row["interval"]
        console.print(
            f"{name:>14} {length:7,} tokens: {row['correct'] / row['total']:6.1%} ({low:.1%} to {high:.1%})  by depth "
            + " ".join(f"{count / per_depth:.0%}" for count in correct),
            highlight=False,
            soft_wrap=True,
        )


def about(settings: Settings, options: PatternOptions) -> recorded.Row:
    """The fields of a row that say which model ran under which pattern."""
    same = settings.block_size == preset(options.pattern).block_size
    return {
        "model": f"passkey, {settings.layers} layers of width {settings.width}",
        "pattern": options.pattern,
        "options": {} if same else {"block_size": settings.block_size},
        "trained": settings.pattern,
        "steps": settings.steps,
        "tokens": settings.steps * settings.tokens,
        "seed": settings.seed,
        "probe": settings.probe,
    }


def _has_gpu() -> bool:
    return torch.cuda.is_available()
