"""``vllm-power bench report``: the tables of README.md and docs/benchmarks.md and the plots, from recorded rows."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_power.tools.bench import report_memory
from vllm_power.tools.bench.engine import say
from vllm_power.tools.common.plots import pyplot, save
from vllm_power.tools.common.results import Row, last_run, rows, where

PAGES = (Path("README.md"), Path("docs/benchmarks.md"))
MARK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.S)


def timed(measured: list[Row]) -> list[Row]:
    """The rows of times. serve.jsonl also has rows of ``bench serve --load``, of runs of their own."""
    return [row for row in measured if "median_ms" in row]


def latest(measured: list[Row]) -> dict[tuple[str, int, int, str], float]:
    """{(bench, batch, context, impl): median ms} of the last run; the last row wins if two measure the same."""
    return {
        (row["bench"], row["batch"], row["context"], row["impl"]): row["median_ms"]
        for row in last_run(timed(measured))
    }


def serve_table(measured: list[Row]) -> str:
    """vLLM end to end: time to first token and decode steps, dense and under the pattern."""
    names = {"ttft": "time to first token", "decode_step": "decode step"}
    return _table(measured, names, {"dense": "FLASH_ATTN ms", "power": "power ms"})


def cpu_table(measured: list[Row]) -> str:
    """Attention steps on a CPU, vLLM's dense backend and the pattern."""
    names = {"prefill": "prefill", "prefill_2048": "prefill of the last 2,048", "decode": "decode"}
    return _table(measured, names, {"dense": "dense ms", "power": "power ms"})


def kernels_table(measured: list[Row]) -> str:
    """One layer's kernels: dense FlashAttention 3 (pages of 16), FlashAttention 3 over the plan, and ours."""
    names = {"prefill": "prefill", "decode": "decode"}
    columns = {"dense_fa3": "FA3 dense ms", "plan_fa3": "FA3 over the plan ms", "power": "power ms"}
    shown = (1_024, 8_192, 16_384, 131_072, 1_048_576)
    return _table([row for row in measured if row.get("context") in shown], names, columns)


def _table(measured: list[Row], names: dict[str, str], columns: dict[str, str]) -> str:
    """A line per measured case; ``columns`` are the implementations, the dense one first and ours last."""
    times = latest(measured)
    lines = [
        f"| | batch | context | {' | '.join(columns.values())} | ratio |",
        "| --- " * (len(columns) + 4) + "|",
    ]
    order = list(names)
    works = {key[:3] for key in times if key[0] in names}
    for bench, batch, context in sorted(works, key=lambda work: (order.index(work[0]), *work[1:])):
        found = [times.get((bench, batch, context, impl)) for impl in columns]
        if found[0] is not None and found[-1] is not None:
            cells = " | ".join("" if ms is None else _number(ms) for ms in found)
            ratio = found[0] / found[-1]
            lines.append(f"| {names[bench]} | {batch} | {context:,} | {cells} | {ratio:.2f}x |")
    return f"{where(timed(measured)[-1])}\n\n" + "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


# The README's lines: (bench, batch, context) in serve.jsonl.
SUMMARY = {
    ("ttft", 1, 512): "time to first token, 512 tokens",
    ("ttft", 1, 8_192): "time to first token, 8,192 tokens",
    ("ttft", 1, 131_072): "time to first token, 131,072 tokens",
    ("decode_step", 1, 131_072): "decode step, 1 sequence of 131,072 tokens",
    ("decode_step", 8, 131_072): "decode step, 8 sequences of 131,072 tokens",
}


def summary_table(served: list[Row], memory: list[Row]) -> str:
    """The README's table: a few lines of serve.jsonl, and the KV blocks that a long prompt holds."""
    times = latest(served)
    lines = ["| | FLASH_ATTN | power | |", "| --- | --- | --- | --- |"]
    for work, what in SUMMARY.items():
        if (dense := times.get((*work, "dense"))) and (ours := times.get((*work, "power"))):
            lines.append(f"| {what} | {_number(dense)} ms | {_number(ours)} ms | {dense / ours:.2f}x |")
    live = last_run([row for row in memory if row["bench"] == "live"])
    row = next(row for row in reversed(live) if row["impl"] == report_memory.ON)
    without, held, share = report_memory.held_blocks(live)
    what = f"KV blocks held after a prompt of {row['context']:,} tokens, without and with reclamation"
    lines.append(f"| {what} | {without} | {held} | {share} |")
    heading, of_blocks = where(timed(served)[-1]), where(row)
    if of_blocks != heading:
        machine, _, commit = of_blocks.rpartition(", ")
        heading = f"{heading[:-1]}; KV blocks: {commit if heading.startswith(machine) else of_blocks}"
    return f"{heading}\n\n" + "\n".join(lines) + "\n"


# {mark: (the function that makes the table, the files in docs/results that it reads)}
TABLES: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "summary": (summary_table, ("serve", "memory")),
    "serve": (serve_table, ("serve",)),
    "kernels": (kernels_table, ("kernels",)),
    "cpu": (cpu_table, ("cpu",)),
    "memory": (report_memory.table, ("memory",)),
}
# {file: (title, the dense implementation in its rows, {bench: its name in the plot})}
PLOTS = {
    "serve": ("vLLM, Qwen2-7B shape", "dense", {"ttft": "time to first token", "decode_step": "decode step"}),
    "kernels": ("one layer, Qwen2-7B shape", "dense_fa3", {"prefill": "prefill", "decode": "decode"}),
}


def filled(text: str, folder: Path) -> str:
    """``text`` with every marked table regenerated from the rows in ``folder``."""

    def replace(match: re.Match[str]) -> str:
        table, files = TABLES[match[2]]
        measured = [rows(folder, file) for file in files]
        return f"{match[1]}{table(*measured)}{match[3]}" if all(measured) else match[0]

    return MARK.sub(replace, text)


def plot(folder: Path, name: str) -> Path:
    """Draw the speedup over dense attention by context, from ``folder``/``name``.jsonl into ``name``.svg."""
    plt = pyplot()
    title, dense, names = PLOTS[name]
    times = latest(rows(folder, name))
    lines: dict[str, list[tuple[int, float]]] = {}
    for (bench, batch, context, impl), ms in times.items():
        ours = times.get((bench, batch, context, "power"))
        if impl == dense and bench in names and ours is not None:
            label = names[bench] + (f", batch {batch}" if bench.startswith("decode") else "")
            lines.setdefault(label, []).append((context, ms / ours))
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="context, tokens", ylabel="speedup over dense FlashAttention 3", title=title)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, folder / f"{name}.svg")


def plot_rates(folder: Path) -> Path:
    """Draw the kernels' rates on visible blocks and the GPU's measured ceilings into kernels-rates.svg."""
    plt = pyplot()
    measured = last_run(rows(folder, "kernels"))
    ceilings = {row["impl"]: row for row in measured if row["bench"] == "ceiling"}
    names = {
        "power": "power",
        "plan_fa3": "FA3 over the plan",
        "flex": "FlexAttention",
        "xformers_plan": "xformers",
    }
    figure, panels = plt.subplots(1, 2, figsize=(12, 4))
    for axes, bench, rate, unit, ceiling, most in (
        (panels[0], "prefill", "tflops", "TFLOP/s", "matmul_8192", ceilings["matmul_8192"]["tflops"]),
        (panels[1], "decode", "gb_per_s", "GB/s", "copy", 1e3 * ceilings["copy"]["tb_per_s"]),
    ):
        lines: dict[str, dict[int, float]] = {}
        for row in measured:
            if row["bench"] == bench and row["impl"] in names:
                batch = f", batch {row['batch']}" if bench == "decode" else ""
                lines.setdefault(names[row["impl"]] + batch, {})[row["context"]] = row[rate]
        for label, points in lines.items():
            style = "-" if label.startswith("power") else "--"
            axes.plot(*zip(*sorted(points.items()), strict=True), style, marker=".", label=label)
        axes.axhline(most, color="grey", linewidth=0.8, label=f"ceiling: {ceiling.partition('_')[0]}")
        axes.set(xlabel="context, tokens", ylabel=f"{unit} on visible blocks", title=bench, ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, folder / "kernels-rates.svg")


def main(pages: Sequence[Path] = PAGES, folder: Path = Path("docs/results")) -> int:
    """Regenerate the tables of ``pages`` and the plots. Returns 0, or 1 if a page or ``folder`` is missing."""
    if missing := [str(path) for path in (*pages, folder) if not path.exists()]:
        say(f"bench report: there is no {' and no '.join(missing)} here; run it in a checkout of vllm-power.")
        return 1
    for page in pages:
        page.write_text(filled(page.read_text(), folder))
    for name in PLOTS:
        if rows(folder, name):
            plot(folder, name)
    if rows(folder, "kernels"):
        plot_rates(folder)
    if rows(folder, "memory"):
        report_memory.plot(folder)
    return 0
