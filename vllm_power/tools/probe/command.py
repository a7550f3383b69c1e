"""The options of ``vllm-power probe``."""

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

# Every tokenizer distinguishes numbers, including the passkey model's. The paper uses six words: apple,banana,...
KEYS = "48213,07946,91350,26871,53094,60782"


def probe_command(
    model: Model,
    power: PatternJson = None,
    keys: Annotated[
        str, typer.Option(help="The keys, separated by commas; each prompt hides one of them.")
    ] = KEYS,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens per prompt, whole blocks.")] = 16_384,
    depth: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Position of the key, as a share of the prompt.")
    ] = 0.1,
    samples: Annotated[int, typer.Option(min=24, help="Prompts; a quarter of them is held out.")] = 1_200,
    seed: Annotated[int, typer.Option(help="Random seed of the prompts.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    folder: Annotated[Path, typer.Option(help="Output folder for probe.jsonl and probe.svg.")] = Path(
        "probe"
    ),
) -> None:
    """Measure with linear probes which blocks of which layers carry a key hidden in the text."""
    with errors_in_one_line("probe", "train,eval", "matplotlib"):
        from vllm_power.tools.probe.probe import run

        names = tuple(key.strip() for key in keys.split(","))
        if len(names) < 2 or not all(names) or samples < 8 * len(names):
            raise ValueError(
                "probe needs at least two --keys, none of them empty, and eight --samples per key"
            )
        run(
            model,
            options=None if power is None else json_object(power, "--power"),
            keys=names,
            tokens=tokens,
            depth=depth,
            samples=samples,
            seed=seed,
            dtype=dtype,
            device=device,
            folder=folder,
        )
