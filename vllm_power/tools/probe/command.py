"""The options of `vllm-power probe`."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_power.tools.common.command_options import (
    Device,
    Dtype,
    Model,
    PatternJson,
    errors_in_one_line,
    json_object,
)

# Any tokenizer can tell numbers apart, the small model's too. The paper has six words: apple,banana,cherry,...
KEYS = "48213,07946,91350,26871,53094,60782"


def probe_command(
    model: Model,
    options: PatternJson = None,
    keys: Annotated[str, typer.Option(help="What to hide, one in each prompt; with commas.")] = KEYS,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens of a prompt, whole blocks.")] = 16_384,
    depth: Annotated[float, typer.Option(min=0.0, max=1.0, help="Where the key lies.")] = 0.1,
    samples: Annotated[int, typer.Option(min=24, help="Prompts; a quarter are held out.")] = 1_200,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    folder: Annotated[Path, typer.Option(help="Where probe.jsonl and probe.svg go.")] = Path("probe"),
) -> None:
    """Which blocks of which layers know a key hidden in the text: a linear probe for each, drawn as a heatmap."""
    with errors_in_one_line("probe", "train,eval"):
        from vllm_power.tools.probe.run import run

        told = tuple(key.strip() for key in keys.split(","))
        if len(told) < 2 or not all(told) or samples < 8 * len(told):
            raise ValueError(
                "a probe wants at least two --keys, none of them empty, and eight --samples of each"
            )
        run(
            model,
            options=None if options is None else json_object(options, "--options"),
            keys=told,
            tokens=tokens,
            depth=depth,
            samples=samples,
            seed=seed,
            dtype=dtype,
            device=device,
            folder=folder,
        )
