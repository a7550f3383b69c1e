"""The options of ``vllm-power demo``."""

from typing import Annotated

import typer


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="Model to serve: a folder or a name.", show_default="the model in this package"),
    ] = None,
    backend: Annotated[str, typer.Option(help="vLLM attention backend to use instead.")] = "power",
    tokens: Annotated[
        int | None,
        typer.Option(min=64, help="Tokens per long prompt.", show_default="32768; 8192 with --model"),
    ] = None,
) -> None:
    """Serve a small model with the backend, run a passkey test against its OpenAI API, and stop the server."""
    from vllm_power.tools.common.vllm_server import VllmMissing, vllm_executable

    try:
        vllm_executable()  # first, because most of the imports below come with vLLM
    except VllmMissing as error:
        typer.echo(f"{error}.", err=True)
        raise typer.Exit(1) from None
    from vllm_power.tools.demo.run import run

    raise typer.Exit(run(model=model, backend=backend, tokens=tokens))
