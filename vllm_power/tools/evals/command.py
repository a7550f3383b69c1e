"""The options of `vllm-power eval`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from vllm_power.tools.common.command_options import require
from vllm_power.tools.evals.settings import EvalError, Settings, even_depths, parse_lengths, parse_tasks

MODEL, MEASURED, OUTPUT = "The model", "What is measured", "Running and results"


def eval_command(
    context: typer.Context,
    url: Annotated[
        str | None, typer.Option(help="Base URL of a running endpoint, ending in /v1.", rich_help_panel=MODEL)
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            help="A model to start with `vllm serve`; what follows -- goes to it.", rich_help_panel=MODEL
        ),
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Attention backend of the server that is started.", rich_help_panel=MODEL)
    ] = "power",
    power: Annotated[
        str | None,
        typer.Option(
            help="With --serve: the options under `power` in --additional-config, as JSON.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    dense_url: Annotated[
        str | None,
        typer.Option(help="Endpoint of the dense model, for the task agreement.", rich_help_panel=MODEL),
    ] = None,
    dense_backend: Annotated[
        str | None,
        typer.Option(
            help="With --serve: backend of the second server, for agreement.",
            show_default="vLLM's choice",
            rich_help_panel=MODEL,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which model, where --url serves several.", rich_help_panel=MODEL)
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Folder or name of the tokenizer.",
            show_default="as the endpoint says",
            rich_help_panel=MODEL,
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(help="Ask through the chat API, for instruction-tuned models.", rich_help_panel=MODEL),
    ] = False,
    thinking: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --chat: tokens for the thoughts of a reasoning model, beyond each length.",
            rich_help_panel=MODEL,
        ),
    ] = 2048,
    tasks: Annotated[
        str,
        typer.Option(
            help="passkey, needle, perplexity, agreement, ruler_qa, a family of RULER; ruler: those that "
            "need no data; all: whatever the other options allow.",
            rich_help_panel=MEASURED,
        ),
    ] = "passkey,needle",
    lengths: Annotated[
        str | None,
        typer.Option(
            help='Tokens, the answer included: "4096,32k".',
            show_default="4k to 32k, as the server allows",
            rich_help_panel=MEASURED,
        ),
    ] = None,
    depths: Annotated[int, typer.Option(min=1, help="Depths of a grid.", rich_help_panel=MEASURED)] = 11,
    samples: Annotated[
        int, typer.Option(min=1, help="Prompts for each cell of a grid.", rich_help_panel=MEASURED)
    ] = 3,
    ruler_samples: Annotated[
        int,
        typer.Option(min=1, help="Prompts for each family of RULER and length.", rich_help_panel=MEASURED),
    ] = 25,
    text: Annotated[
        Path | None,
        typer.Option(help="A text: for perplexity, agreement and the needles.", rich_help_panel=MEASURED),
    ] = None,
    windows: Annotated[
        int,
        typer.Option(min=1, help="Windows of the text for each length, at most.", rich_help_panel=MEASURED),
    ] = 8,
    top_logprobs: Annotated[
        int,
        typer.Option(
            min=1, help="Best tokens that agreement compares; vLLM allows 20.", rich_help_panel=MEASURED
        ),
    ] = 20,
    qa_data: Annotated[
        Path | None,
        typer.Option(help="Questions in SQuAD's format, for ruler_qa.", rich_help_panel=MEASURED),
    ] = None,
    prompts: Annotated[
        Literal["auto", "text", "tokens"],
        typer.Option(
            help="Passkeys as text, or as token ids of the project's passkey documents; auto: as the tokenizer is.",
            rich_help_panel=MEASURED,
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Another one gives other prompts.", rich_help_panel=MEASURED)] = 0,
    folder: Annotated[
        Path,
        typer.Option(
            help="Results; the same command with the same folder resumes there.",
            rich_help_panel=OUTPUT,
        ),
    ] = Path("eval-results"),
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.", rich_help_panel=OUTPUT)] = 8,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for one answer.", rich_help_panel=OUTPUT)
    ] = 600.0,
    gate: Annotated[
        Path | None,
        typer.Option(help="Fail where an accuracy falls below those recorded here.", rich_help_panel=OUTPUT),
    ] = None,
    write_gate: Annotated[
        Path | None, typer.Option(help="Record the accuracies here.", rich_help_panel=OUTPUT)
    ] = None,
) -> None:
    """Measure what a served model can still recall.

    Passkeys, needles, the families of RULER, perplexity by length, and agreement with the dense model.
    The key of the endpoint is taken from OPENAI_API_KEY.
    """
    from vllm_power.tools.evals.target import Target, server_arguments

    can_agree = serve is not None or dense_url is not None
    try:
        settings = Settings(
            tasks=parse_tasks(tasks, text=text is not None, qa_data=qa_data is not None, dense=can_agree),
            lengths=parse_lengths(lengths) if lengths else (),
            depths=even_depths(depths),
            samples=samples,
            ruler_samples=ruler_samples,
            windows=windows,
            top_logprobs=top_logprobs,
            seed=seed,
            chat=chat,
            prompts=prompts,
            text=text,
            qa_data=qa_data,
            tokenizer=tokenizer,
            thinking=thinking if chat else 0,
        )
        others = context.args
        arguments = server_arguments(backend, power, others) if serve else tuple(others)
        target = Target(url=url, serve=serve, arguments=arguments)
        dense = None
        if "agreement" in settings.tasks:
            if not can_agree:
                raise EvalError("agreement needs the dense model: give its endpoint with --dense-url")
            same = server_arguments(dense_backend, None, others)
            dense = Target(url=dense_url) if dense_url else Target(serve=serve, arguments=same)
    except EvalError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        from vllm_power.tools.evals.run import Job, run

        require("jinja2", "matplotlib")
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is not installed: pip install 'vllm-power[eval]'", err=True)
        raise typer.Exit(2) from None
    job = Job(
        settings=settings,
        target=target,
        dense=dense,
        model=model,
        folder=folder,
        concurrency=concurrency,
        timeout=timeout,
        api_key=os.environ.get("OPENAI_API_KEY"),
        gate=gate,
        write_gate=write_gate,
    )
    raise typer.Exit(run(job))
