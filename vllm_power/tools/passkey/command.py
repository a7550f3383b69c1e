"""``vllm-power passkey``: train the small model under a pattern, evaluate it, compare patterns, draw the comparison."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_power.tools.common.command_options import errors_in_one_line

passkey = typer.Typer(no_args_is_help=True)

Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Training steps. The same number for patterns to compare.",
        show_default="gpu 2,000, cpu 1,278, toy 300",
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(help="Append the rows to adapted.jsonl in this folder.", show_default="the folder itself"),
]
PerDepth = Annotated[
    int | None,
    typer.Option(
        min=1, help="Passkeys for each length and twentieth of the depth.", show_default="20; on a CPU 3"
    ),
]
Size = Annotated[
    Literal["gpu", "cpu", "toy"] | None,
    typer.Option(
        help="Size of model and training; a toy takes half a minute.", show_default="what the machine has"
    ),
]
Probe = Annotated[float, typer.Option(min=0.0, help="Weight of the probe's loss.")]


@passkey.callback()
def passkey_callback() -> None:
    """A small model that finds a passkey in 32K tokens under a pattern, trained from scratch."""


@passkey.command("train")
def train_command(
    folder: Annotated[
        Path, typer.Argument(help="For checkpoints, log and model. The same command resumes there.")
    ],
    pattern: Annotated[str, typer.Option(help="The pattern to train under.")] = "power",
    size: Size = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    probe: Probe = 1.0,
    results: Results = None,
    per_depth: PerDepth = None,
) -> None:
    """Train under one pattern, write FOLDER/model, and evaluate it at every length and depth."""
    with errors_in_one_line("passkey", "train"):
        from rich.console import Console

        from vllm_power.tools.passkey.run import main, settings_of

        settings = settings_of(size, pattern, seed, probe, steps)
        main(settings, folder, results or folder, per_depth, Console(highlight=False))


@passkey.command("evaluate")
def evaluate_command(
    folder: Annotated[Path, typer.Argument(help="A folder of `passkey train`.")],
    pattern: Annotated[
        str | None,
        typer.Option(help="The pattern to run under.", show_default="the one it was trained under"),
    ] = None,
    results: Results = None,
    per_depth: PerDepth = None,
) -> None:
    """Evaluate a trained model at every length and depth, under any pattern."""
    with errors_in_one_line("passkey", "train"):
        from rich.console import Console

        from vllm_power.tools.passkey.run import evaluate

        evaluate(folder, pattern, results or folder, per_depth, Console(highlight=False))


@passkey.command("compare")
def compare_command(
    folder: Annotated[
        Path, typer.Argument(help="Each training has a folder there. The same command resumes.")
    ],
    patterns: Annotated[
        str, typer.Option(help="The patterns, with commas.")
    ] = "power,stride_slash,sliding_window,longnet,dilated",
    seeds: Annotated[str, typer.Option(help="The seeds, with commas.")] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at the same time, per GPU.")] = 1,
    size: Size = None,
    steps: Steps = None,
    probe: Probe = 1.0,
    results: Results = None,
    per_depth: PerDepth = None,
) -> None:
    """Train and evaluate under several patterns with several seeds, on all GPUs of this machine."""
    with errors_in_one_line("passkey", "train"):
        from rich.console import Console

        from vllm_power.tools.passkey.compare import all_settings, compare
        from vllm_power.tools.passkey.run import settings_of

        names, numbers = patterns.split(","), [int(seed) for seed in seeds.split(",")]
        for name in names:
            base = settings_of(size, name, 0, probe, steps)
        each = all_settings(base, names, numbers)
        compare(each, folder, results or folder, per_depth, jobs, Console(highlight=False))


@passkey.command("plot")
def plot_command(
    folder: Annotated[Path, typer.Argument(help="The folder with adapted.jsonl.")],
) -> None:
    """Draw accuracy by length with intervals, one line per pattern, into passkey.svg."""
    with errors_in_one_line("passkey", "train"):
        from vllm_power.tools.passkey.plot import plot

        typer.echo(plot(folder))
