"""The options of ``vllm-power demo``."""

from typing import Annotated

import typer


def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="Model to serve: a folder or a name.", show_default="SmolLM2-135M, from PyPI"),
    ] = None,
    backend: Annotated[str, typer.Option(help="vLLM attention backend to use instead.")] = "power",
    tokens: Annotated[
        int | None,
        typer.Option(
            min=64, help="Tokens per long prompt, not for SmolLM2.", show_default="32768; 8192 with --model"
        ),
    ] = None,
    packaged: Annotated[
        bool,
        typer.Option(
            "--packaged", help="Serve the small passkey model of this package, trained under the pattern."
        ),
    ] = False,
) -> None:
    """Serve a small model with the backend, ask its OpenAI API for what a long text hides, and stop the server."""
    from vllm_power.tools.common.vllm_server import VllmMissing, vllm_executable

    try:
        vllm_executable()  # first, because most of the imports below come with vLLM
    except VllmMissing as error:
        typer.echo(f"{error}.", err=True)
        raise typer.Exit(1) from None
    from vllm_power.tools.demo.run import run

    raise typer.Exit(run(model=model, backend=backend, tokens=tokens, packaged=packaged))
