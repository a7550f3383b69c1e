"""The options of ``vllm-power doctor``."""

from typing import Annotated

import typer


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Check the machine and the installation, and suggest fixes; fail if a check fails."""
    from vllm_power.tools.doctor.report import main

    raise typer.Exit(main(as_json))
