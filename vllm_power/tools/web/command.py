"""The options of ``vllm-power explore``."""

from pathlib import Path
from typing import Annotated

import typer


def explore_command(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 selects a free one.")] = 8700,
    model: Annotated[
        Path | None, typer.Option(help="Model for the planner: its folder or config.json.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Another host to answer for, as behind a proxy that keeps the Host header."),
    ] = None,
) -> None:
    """Serve a page that draws the pattern and sizes deployments; needs neither vLLM nor a GPU."""
    try:
        from vllm_power.tools.web.explore import main
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is not installed: pip install 'vllm-power[explore]'", err=True)
        raise typer.Exit(1) from None

    raise typer.Exit(main(host, port, model, allow_host or ()))
