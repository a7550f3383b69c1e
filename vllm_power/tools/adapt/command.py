"""The options of `vllm-power adapt`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_power.tools.common.command_options import PatternJson, errors_in_one_line, json_object


def adapt_command(
    model: Annotated[str, typer.Argument(help="The model to begin from: a folder or a name.")],
    data: Annotated[
        list[Path], typer.Option(help="Text: .txt, .jsonl or .parquet; may be given several times.")
    ],
    output: Annotated[Path, typer.Option(help="The model's folder; the same command resumes there.")],
    power: PatternJson = None,
    stages: Annotated[
        str, typer.Option(help="LENGTH:TOKENS or LENGTH:STEPS of each stage, with commas.")
    ] = "4K:250M,8K:250M,16K:250M,32K:250M",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step, all GPUs together.")] = 524_288,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, show_default="1e-5, with --lora 2e-4", help="At its peak.")
    ] = None,
    warmup: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the steps.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(min=0.0)] = 0.1,
    lora: Annotated[int, typer.Option(min=0, help="Train adapters of this rank; 0: the layers.")] = 0,
    embeddings: Annotated[
        bool,
        typer.Option(
            help="Without --lora: also train the embeddings and the head. Tokens that --data lacks are then forgotten."
        ),
    ] = False,
    precision: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="What is computed in; learnt weights are float32.")
    ] = "bf16",
    apart: Annotated[
        bool, typer.Option(help="Documents do not see each other; else sequences run across them.")
    ] = False,
    field: Annotated[str, typer.Option(help="The text's column in .jsonl and .parquet.")] = "text",
    held_out: Annotated[
        list[Path] | None,
        typer.Option(help="Text for the evaluation.", show_default="cut from --data"),
    ] = None,
    eval_tokens: Annotated[
        int, typer.Option(min=0, help="Held-out tokens for each length; 0: no evaluation.")
    ] = 262_144,
    spike: Annotated[
        float,
        typer.Option(min=1.0, help="Stop if the loss stays above this many times the latest steps' median."),
    ] = 2.0,
    distill: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the loss that is the divergence from the dense model."),
    ] = 0.0,
    recall: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of the sequences with hidden facts that are asked for."),
    ] = 0.0,
    probe: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Weight of a probe that asks each block after a hidden fact for it, so that layers pass it on.",
        ),
    ] = 0.0,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the documents' order, and of adapters.")] = 0,
) -> None:
    """Continued pre-training of a model under the pattern, with an evaluation before and after."""
    with errors_in_one_line("adapt", "train", "matplotlib"):
        from vllm_power.tools.adapt.run import run
        from vllm_power.tools.adapt.settings import Settings, stages_of

        settings = Settings(
            model=model,
            data=tuple(map(str, data)),
            power=json_object(power or "{}", "--power"),
            stages=stages_of(stages),
            held_out=tuple(map(str, held_out or ())),
            field=field,
            apart=apart,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            lora=lora,
            embeddings=embeddings,
            precision=precision,
            eval_tokens=eval_tokens,
            spike=spike,
            seed=seed,
            distill=distill,
            recall=recall,
            probe=probe,
        )
        run(settings, output, save_every)
