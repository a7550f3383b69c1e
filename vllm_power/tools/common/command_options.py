"""Options and error handling that several commands share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="The model: a folder or a name.")]
PatternJson = Annotated[
    str | None,
    typer.Option(
        help="Options of the backend as JSON, as under `power` in --additional-config.",
        show_default="the checkpoint's, else power",
    ),
]
Dtype = Annotated[str, typer.Option(help="dtype for transformers: auto, bfloat16, float32.")]
Device = Annotated[str, typer.Option(help="device_map for transformers: auto, cpu, cuda:0.")]


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError if one is not installed: for what is imported only at the end, after hours of work."""
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


class Stopped(Exception):
    """A training was stopped by a signal; the same command resumes it."""


@contextmanager
def errors_in_one_line(command: str, extra: str, *at_end: str) -> Iterator[None]:
    """Exit with status 1 and one line if a file or a value is wrong, a package of ``extra`` is missing, or a training
    was stopped or cannot continue.

    at_end: packages that the command imports only at its end; it misses them at its start.
    """
    try:
        require(*at_end)
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is not installed: pip install 'vllm-power[{extra}]'", err=True)
        raise typer.Exit(1) from None
    except (OSError, ValueError, FloatingPointError, Stopped) as error:
        typer.echo(f"{command}: {error}", err=True)
        raise typer.Exit(1) from None


def json_object(text: str, source: str) -> dict[str, Any]:
    """Parse the JSON object in an option; ``source`` is its name in errors. Raises ValueError."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'{source} must be a JSON object such as {{"block_size": 64}}, not {text}')
    return found
