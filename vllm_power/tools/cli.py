"""The command line `vllm-power`. A command imports what it needs when it runs: `--help` is quick."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_power.tools.adapt.command import adapt_command
from vllm_power.tools.calibrate.command import calibrate_command
from vllm_power.tools.evals.command import eval_command
from vllm_power.tools.passkey.command import passkey
from vllm_power.tools.probe.command import probe_command

app = typer.Typer(help="PowerAttention for vLLM: tools around the attention backend.", no_args_is_help=True)
bench = typer.Typer(no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(passkey, name="passkey")

# The command hands everything after its name, --help included, to a program with its own arguments.
HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command("pattern", context_settings=HANDED_ON)
def pattern_command(context: typer.Context) -> None:
    """Draw an attention pattern and print its counts."""
    from vllm_power.pattern import main

    main(context.args)


@app.command("demo")
def demo_command(
    model: Annotated[
        str | None,
        typer.Option(help="A model to serve: a folder or a name.", show_default="the one that comes along"),
    ] = None,
    backend: Annotated[str, typer.Option(help="Another attention backend of vLLM, to compare.")] = "power",
    tokens: Annotated[
        int | None,
        typer.Option(min=64, help="Tokens of the long prompts.", show_default="32768; with --model 8192"),
    ] = None,
) -> None:
    """Serve a small model with the backend, ask it for passkeys in long prompts over the OpenAI API, and stop it."""
    from vllm_power.tools.common.vllm_server import VllmMissing, vllm_executable

    try:
        vllm_executable()  # first: most of what the rest imports comes with vLLM
    except VllmMissing as error:
        typer.echo(f"{error}.", err=True)
        raise typer.Exit(1) from None
    from vllm_power.tools.demo.run import run

    raise typer.Exit(run(model=model, backend=backend, tokens=tokens))


@bench.callback()
def bench_callback() -> None:
    """Measure, and compare with dense attention."""


def need_gpu(command: str) -> None:
    """End the command where there is no NVIDIA GPU, before it imports what there may only be beside one."""
    from vllm_power.tools.bench.engine import lacks_gpu

    if lacks_gpu(command, "vllm-power bench cpu compares on a CPU"):
        raise typer.Exit(1)


@bench.command("cpu")
def bench_cpu_command(
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each case.")] = 4.0,
    folder: Annotated[Path | None, typer.Option(help="Append the rows to cpu.jsonl there.")] = None,
) -> None:
    """The CPU executor against vLLM's dense CPU attention; fails where a case misses its goal."""
    from vllm_power.tools.bench.cpu import main

    raise typer.Exit(main(seconds, folder))


@bench.command("serve")
def bench_serve_command(
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each length.")] = 5,
    folder: Annotated[Path, typer.Option(help="Where serve.jsonl is.")] = Path("docs/results"),
) -> None:
    """The whole engine on a GPU, against vLLM's FlashAttention; appends its rows to serve.jsonl."""
    need_gpu("bench serve")
    from vllm_power.tools.bench.serve import main

    raise typer.Exit(main(repeats=repeats, folder=folder))


@bench.command("kernels")
def bench_kernels_command(
    million: Annotated[bool, typer.Option(help="Prefill one prompt of 1,048,576 tokens too.")] = True,
    folder: Annotated[Path, typer.Option(help="Where kernels.jsonl is.")] = Path("docs/results"),
) -> None:
    """The kernels on a GPU, against their peers; appends its rows to kernels.jsonl."""
    need_gpu("bench kernels")
    from vllm_power.tools.bench.kernels import main

    raise typer.Exit(main(million=million, folder=folder))


@bench.command("memory")
def bench_memory_command(
    part: Annotated[
        str, typer.Option(help="Which parts, with commas.")
    ] = "live,concurrency,scheduler,throughput",
    requests: Annotated[int, typer.Option(min=1, help="Requests of the throughput part.")] = 64,
    context: Annotated[int, typer.Option(min=1024, help="Tokens of a prompt.")] = 131_072,
    output: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 1_024,
    cache_sequences: Annotated[
        int, typer.Option(min=0, help="Whole sequences that the cache holds; 0: throughput takes all memory.")
    ] = 4,
    seconds: Annotated[float, typer.Option(min=1, help="The most for a backend's throughput.")] = 3_600,
    folder: Annotated[Path, typer.Option(help="Where memory.jsonl is.")] = Path("docs/results"),
) -> None:
    """What giving KV blocks back early brings, and what it costs; appends its rows to memory.jsonl."""
    from vllm_power.tools.bench.memory import PARTS, main

    parts = tuple(part.split(","))
    if unknown := set(parts) - set(PARTS):
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    raise typer.Exit(main(parts, requests, context, output, cache_sequences, seconds, folder))


@bench.command("report")
def bench_report_command() -> None:
    """Draw the README's tables and the plots in docs/results anew from the recorded rows."""
    from vllm_power.tools.bench.report import main

    raise typer.Exit(main())


@app.command("explore")
def explore_command(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8700,
    model: Annotated[
        Path | None, typer.Option(help="A model's folder, or its config.json, for the planner.")
    ] = None,
) -> None:
    """Serve a page that draws the pattern and plans GPUs; needs neither vLLM nor a GPU."""
    try:
        from vllm_power.tools.web.explore import main
    except ModuleNotFoundError as error:
        typer.echo(f"{error.name} is not installed: pip install 'vllm-power[explore]'", err=True)
        raise typer.Exit(1) from None

    raise typer.Exit(main(host, port, model))


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check the machine and the installation, and say what to do; fails where something has to be mended."""
    from vllm_power.tools.doctor.report import main

    raise typer.Exit(main(as_json))


# What follows `--` goes to the server that it starts.
app.command("eval", context_settings={"allow_extra_args": True})(eval_command)


app.command("calibrate")(calibrate_command)
app.command("adapt")(adapt_command)
app.command("probe")(probe_command)


@app.command("version")
def version_command() -> None:
    """Print the versions of vllm-power and of what it runs on."""
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm-power", "vllm", "torch", "triton"):
        try:
            typer.echo(f"{name} {version(name)}")
        except PackageNotFoundError:
            typer.echo(f"{name} is not installed")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
