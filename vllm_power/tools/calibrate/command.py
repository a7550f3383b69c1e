"""The options of `vllm-power calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_power.tools.common.command_options import Device, Dtype, Model, PatternJson, errors_in_one_line


def calibrate_command(
    model: Model,
    budget: Annotated[int, typer.Option(min=1, help="How many layers to keep dense.")],
    text: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="A text file like what will be served.")
    ],
    options: PatternJson = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of a window of the text.")] = 8192,
    windows: Annotated[int, typer.Option(min=1, help="The most windows, spread over the text.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    folder: Annotated[Path, typer.Option(help="Where the rows and the plot go.")] = Path("calibration"),
) -> None:
    """Propose which layers to keep dense: measured on your text, with the option to paste."""
    with errors_in_one_line("calibrate", "train"):
        from vllm_power.tools.calibrate.run import run

        run(model, budget, text, options, tokens, windows, dtype, device, folder)
