"""Commands that belong to no tool: ``vllm-power pattern`` and ``vllm-power version``."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from vllm_power.pattern import NAMES, draw, preset


def pattern_command(
    name: Annotated[str, typer.Argument(help=f"The pattern: {', '.join(NAMES)}.")] = "power",
    tokens: Annotated[int, typer.Option(min=1, help="Sequence length.")] = 16_384,
    block_size: Annotated[int | None, typer.Option(help="Tokens per block.")] = None,
    sink_blocks: Annotated[int | None, typer.Option(help="First blocks that every query sees.")] = None,
    window_blocks: Annotated[int | None, typer.Option(help="Most recent blocks that a query sees.")] = None,
    stride: Annotated[int | None, typer.Option(help="Block distance between slashes (stride_slash).")] = None,
) -> None:
    """Draw an attention pattern and print its density."""
    options = {
        "block_size": block_size,
        "sink_blocks": sink_blocks,
        "window_blocks": window_blocks,
        "stride": stride,
    }
    try:
        pattern = preset(name, **{option: value for option, value in options.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(draw(pattern, tokens))


def version_command() -> None:
    """Print the versions of vllm-power, vLLM, torch and Triton."""
    for name in ("vllm-power", "vllm", "torch", "triton"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")
