"""The options of `vllm-power calibrate`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_power.tools.common.command_options import Device, Dtype, Model, errors_in_one_line

RECALL, DIVERGENCE = "With --objective recall", "With --objective divergence"


def calibrate_command(
    model: Model,
    budget: Annotated[int, typer.Option(min=1, help="The most layers to keep dense.")] = 8,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A text file that resembles the served prompts; with recall also .jsonl with a field text.",
            show_default="Python's language reference; needed for divergence",
        ),
    ] = None,
    objective: Annotated[
        Literal["recall", "divergence"],
        typer.Option(
            help="recall: numbers hidden in the text are found again, under the rows that are served. divergence: the "
            "next token's distribution stays that of the dense model, with the pattern in every row."
        ),
    ] = "recall",
    power: Annotated[
        str | None,
        typer.Option(
            help="Options of the backend as JSON, as under `power` in --additional-config.",
            show_default="the checkpoint's, else the default mode",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of a prompt, or of a window of the text.")
    ] = 8192,
    tasks: Annotated[
        str, typer.Option(help="The tasks, separated by commas.", rich_help_panel=RECALL)
    ] = "noise,text,lookalikes,pairs",
    n: Annotated[
        int, typer.Option("--n", min=1, help="Prompts per task to choose by.", rich_help_panel=RECALL)
    ] = 8,
    held_out: Annotated[
        int, typer.Option(min=1, help="Other prompts per task to report on.", rich_help_panel=RECALL)
    ] = 32,
    seed: Annotated[int, typer.Option(help="Of the prompts.", rich_help_panel=RECALL)] = 0,
    windows: Annotated[
        int,
        typer.Option(min=1, help="The most windows, spread over the text.", rich_help_panel=DIVERGENCE),
    ] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    folder: Annotated[Path, typer.Option(help="Where the rows and the plot go.")] = Path("calibration"),
) -> None:
    """Propose which layers to keep dense: measured on your text, with the option to paste."""
    with errors_in_one_line("calibrate", "train", "matplotlib"):
        if objective == "recall":
            from vllm_power.tools.calibrate.run_recall import run_recall

            wanted = tuple(name.strip() for name in tasks.split(",") if name.strip())
            run_recall(model, budget, text, power, tokens, n, held_out, wanted, seed, dtype, device, folder)
            return
        if text is None:
            raise ValueError("--objective divergence needs --text, a file like what will be served")
        from vllm_power.tools.calibrate.run import run

        run(model, budget, text, power, tokens, windows, dtype, device, folder)
