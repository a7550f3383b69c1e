"""``vllm-power passkey``: train the small model under a pattern, evaluate it, draw the comparison."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_power.tools.common.command_options import errors_in_one_line

passkey = typer.Typer(no_args_is_help=True)

Minutes = Annotated[
    float | None,
    typer.Option(
        min=0.01, help="At most so many minutes; compiling comes on top.", show_default="gpu 15, cpu 55"
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1, help="At most so many steps: the same for patterns to compare.", show_default="gpu 2,000"
    ),
]
Results = Annotated[
    Path | None,
    typer.Option(help="Append the rows to passkey.jsonl there.", show_default="the folder itself"),
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
        help="Of model and training; a toy takes half a minute.", show_default="what the machine has"
    ),
]


@passkey.callback()
def passkey_callback() -> None:
    """A small model that finds a passkey in 32K tokens under a pattern, trained from scratch."""


@passkey.command("train")
def train_command(
    folder: Annotated[Path, typer.Argument(help="Where checkpoint, log and model go; goes on from there.")],
    pattern: Annotated[str, typer.Option(help="The pattern to train under.")] = "power",
    size: Size = None,
    minutes: Minutes = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    probe: Annotated[float, typer.Option(min=0.0, help="Weight of the probe's loss.")] = 1.0,
    results: Results = None,
    per_depth: PerDepth = None,
) -> None:
    """Train under one pattern, write FOLDER/model, and evaluate it at every length and depth."""
    with errors_in_one_line("passkey", "train"):
        from vllm_power.tools.passkey.run import main

        main(
            folder,
            pattern=pattern,
            size=size,
            minutes=minutes,
            steps=steps,
            seed=seed,
            probe=probe,
            results=results or folder,
            per_depth=per_depth,
        )


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
        from vllm_power.tools.passkey.run import evaluate_folder

        evaluate_folder(folder, pattern, results or folder, per_depth)


@passkey.command("plot")
def plot_command(
    folder: Annotated[Path, typer.Argument(help="Where passkey.jsonl is.")],
) -> None:
    """Draw accuracy by length, one line a training, into passkey.svg."""
    with errors_in_one_line("passkey", "train"):
        from vllm_power.tools.passkey.plot import plot

        typer.echo(plot(folder))
