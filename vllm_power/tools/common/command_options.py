"""What several commands have alike: options, and how they fail."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="The model: a folder or a name.")]
PatternJson = Annotated[
    str | None,
    typer.Option(
        help="The pattern, as under `power` in --additional-config.",
        show_default="the checkpoint's, else power",
    ),
]
Dtype = Annotated[str, typer.Option(help="As in transformers: auto, bfloat16, float32.")]
Device = Annotated[str, typer.Option(help="As transformers' device_map: auto, cpu, cuda:0.")]


class Stopped(Exception):
    """A training was asked to stop before its end; the same command goes on from what it wrote."""


@contextmanager
def errors_in_one_line(command: str, extra: str) -> Iterator[None]:
    """End a command with status 1 and one line where a file or a value is wrong, a package of ``extra`` is missing, or
    a training stopped or can not go on."""
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is not installed: pip install 'vllm-power[{extra}]'", err=True)
        raise typer.Exit(1) from None
    except (OSError, ValueError, FloatingPointError, Stopped) as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(1) from None


def json_object(text: str, source: str) -> dict[str, Any]:
    """The object that an option holds as JSON; ``source`` names it in errors. Raises ValueError."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'{source} must be a JSON object such as {{"block_size": 64}}, not {text}')
    return found
