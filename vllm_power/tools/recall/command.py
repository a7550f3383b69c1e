"""The options of `vllm-power recall`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_power.tools.common.command_options import Model, errors_in_one_line


def recall_command(
    model: Model,
    context: Annotated[
        int, typer.Option(min=256, help="Tokens of a prompt and its answer, at most the model's.")
    ] = 8192,
    n: Annotated[int, typer.Option("--n", min=1, help="Prompts per task.")] = 100,
    tasks: Annotated[
        str, typer.Option(help="The tasks, separated by commas.")
    ] = "noise,text,lookalikes,pairs",
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text to hide numbers in: a text file, or .jsonl with a field text.",
            show_default="Python's language reference",
        ),
    ] = None,
    power: Annotated[
        list[str] | None,
        typer.Option(
            help="Options of the backend as JSON, as under `power` in --additional-config. Repeat it to compare.",
            show_default="{}, the default mode",
        ),
    ] = None,
    dense: Annotated[bool, typer.Option(help="Also measure vLLM's own backend, as the reference.")] = True,
    engine: Annotated[
        str | None,
        typer.Option(help='More arguments of vllm.LLM as JSON, such as {"gpu_memory_utilization": 0.5}.'),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    folder: Annotated[Path, typer.Option(help="Where recall.jsonl and recall.svg go.")] = Path("recall"),
) -> None:
    """Measure what a model recalls from long prompts: dense, in the default mode, and under any options."""
    with errors_in_one_line("recall", "train", "matplotlib"):
        from vllm_power.tools.recall.run import run

        wanted = tuple(name.strip() for name in tasks.split(",") if name.strip())
        run(model, context, n, wanted, text, tuple(power or ()), engine, dense, seed, folder)
