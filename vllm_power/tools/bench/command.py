"""``vllm-power bench``: the options of every benchmark."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

bench = typer.Typer(no_args_is_help=True)

RESULTS = Path("docs/results")


@bench.callback()
def bench_callback() -> None:
    """Measure PowerAttention against dense attention."""


def need_gpu(command: str) -> None:
    """Exit if there is no NVIDIA GPU, before importing packages that are installed only with one."""
    from vllm_power.tools.bench.engine import lacks_gpu

    if lacks_gpu(command, "on a CPU, run vllm-power bench cpu"):
        raise typer.Exit(1)


def pairs_of(text: str, suffix: str = "") -> list[tuple[int, int]]:
    """[(32768, 8), (512, 1)] of "32768x8,512x1"; ``suffix`` is added to each. Exits with status 2 if it is wrong."""
    pairs = []
    for given in filter(None, text.split(",")):
        tokens, _, requests = (given + suffix).partition("x")
        if not (tokens.isdecimal() and requests.isdecimal() and int(tokens) and int(requests)):
            raise typer.BadParameter(
                f"{given!r} is not {'a length' if suffix else 'TOKENSxREQUESTS, as in 32768x8'}"
            )
        pairs.append((int(tokens), int(requests)))
    return pairs


def known_impls(names: Iterable[str]) -> None:
    """Exit with status 2 if there is no such implementation to compare with FlashAttention."""
    from vllm_power.tools.bench.engine import IMPLS

    ours = [name for name in IMPLS if name != "dense"]
    if unknown := set(names) - set(ours):
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))} to compare; there are {', '.join(ours)}")


@bench.command("cpu")
def cpu_command(
    seconds: Annotated[float, typer.Option(min=0.1, help="Measuring time per case.")] = 4.0,
    folder: Annotated[Path | None, typer.Option(help="Append the rows to cpu.jsonl in this folder.")] = None,
) -> None:
    """Compare the CPU executor with vLLM's dense CPU attention; fail if a case misses its goal."""
    from vllm_power.tools.bench.cpu import main

    raise typer.Exit(main(seconds, folder))


@bench.command("serve")
def serve_command(
    repeats: Annotated[int, typer.Option(min=1, help="Prompts per length.")] = 5,
    load: Annotated[
        bool,
        typer.Option("--load", help="Measure as `vllm bench serve` does; the next options belong to this."),
    ] = False,
    cells: Annotated[
        str, typer.Option(help="Prompt tokens x requests at a time, separated by commas.")
    ] = "32768x8,4096x32,512x8",
    output: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 128,
    impl: Annotated[str, typer.Option(help="The implementation to compare with FlashAttention.")] = "power",
    turns: Annotated[int, typer.Option(min=1, help="Runs per cell and server.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Prompts per run: this many times the concurrency.")] = 3,
    cache_gib: Annotated[
        float | None,
        typer.Option(min=0, help="GiB of each server's KV cache.", show_default="18, on a CPU 0.25"),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Append the rows to serve.jsonl in this folder.")] = RESULTS,
) -> None:
    """Compare the whole engine on a GPU with vLLM's FlashAttention backend."""
    if load:
        known_impls([impl])
        asked = pairs_of(cells)
        if not asked:
            raise typer.BadParameter("no cells to measure")
        from vllm_power.tools.bench.load import main as main_load
        from vllm_power.tools.bench.load_client import Cell

        cache_bytes = None if cache_gib is None else int(cache_gib * (1 << 30))
        measured = [Cell(context, concurrency, output) for context, concurrency in asked]
        raise typer.Exit(main_load(measured, impl, turns, rounds, cache_bytes, folder))
    need_gpu("bench serve")
    from vllm_power.tools.bench.serve import main

    raise typer.Exit(main(repeats=repeats, folder=folder))


@bench.command("turns")
def turns_command(
    impls: Annotated[str, typer.Option(help="Implementations to compare, separated by commas.")] = (
        "training_free_all_sparse,training_free,power"
    ),
    prompts: Annotated[
        str | None,
        typer.Option(help="Prompt lengths, separated by commas; '' for none.", show_default="512 to 131,072"),
    ] = None,
    decodes: Annotated[
        str | None,
        typer.Option(
            help="Context x batch of decode steps; '' for none.", show_default="batches of 1, 8 and 32"
        ),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Append the rows to turns.jsonl in this folder.")] = RESULTS,
) -> None:
    """Compare each mode with vLLM's FlashAttention backend, in alternation on one GPU."""
    names = impls.split(",")
    known_impls(names)
    lengths = None if prompts is None else [length for length, _ in pairs_of(prompts, "x1")]
    batches = None if decodes is None else [(batch, context) for context, batch in pairs_of(decodes)]
    if lengths == [] and batches == []:
        raise typer.BadParameter("neither prompts nor decodes to measure")
    need_gpu("bench turns")
    from vllm_power.tools.bench.turns import DECODES, PROMPTS, main

    lengths = list(PROMPTS) if lengths is None else lengths
    raise typer.Exit(main(names, lengths, DECODES if batches is None else batches, folder))


@bench.command("kernels")
def kernels_command(
    million: Annotated[bool, typer.Option(help="Also prefill one prompt of 1,048,576 tokens.")] = True,
    folder: Annotated[Path, typer.Option(help="Append the rows to kernels.jsonl in this folder.")] = RESULTS,
) -> None:
    """Compare the GPU kernels with FlashAttention 3, FlexAttention, Triton and xformers."""
    need_gpu("bench kernels")
    from vllm_power.tools.bench.kernels import main

    raise typer.Exit(main(million=million, folder=folder))


@bench.command("training")
def training_command(
    rows: Annotated[int, typer.Option(min=1, help="Rows of 8,192 tokens per micro-batch.")] = 8,
    folder: Annotated[Path, typer.Option(help="Append the rows to adapted.jsonl in this folder.")] = RESULTS,
) -> None:
    """Measure training on a GPU, attention alone and whole steps, against other kernels; append to adapted.jsonl."""
    need_gpu("bench training")
    from vllm_power.tools.bench.training import main

    raise typer.Exit(main(rows=rows, folder=folder))


@bench.command("memory")
def memory_command(
    part: Annotated[
        str, typer.Option(help="The parts to run, separated by commas.")
    ] = "live,concurrency,scheduler,hits,tier,throughput,offloading",
    requests: Annotated[int, typer.Option(min=1, help="Requests in the throughput part.")] = 64,
    context: Annotated[int, typer.Option(min=1024, help="Tokens per prompt.")] = 131_072,
    output: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 1_024,
    cache_sequences: Annotated[
        int,
        typer.Option(min=0, help="Cache size in whole sequences; 0: throughput uses all free GPU memory."),
    ] = 4,
    seconds: Annotated[
        float, typer.Option(min=1, help="Time limit per backend in the throughput part.")
    ] = 3_600,
    folder: Annotated[Path, typer.Option(help="Append the rows to memory.jsonl in this folder.")] = RESULTS,
) -> None:
    """Measure the gain and the cost of KV reclamation."""
    from vllm_power.tools.bench.memory import PARTS, main

    parts = tuple(part.split(","))
    if unknown := set(parts) - set(PARTS):
        raise typer.BadParameter(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    raise typer.Exit(main(parts, requests, context, output, cache_sequences, seconds, folder))


@bench.command("report")
def report_command() -> None:
    """Regenerate the tables of README.md and docs/benchmarks.md and the plots in docs/results."""
    from vllm_power.tools.bench.report import main

    raise typer.Exit(main())
