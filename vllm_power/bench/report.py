"""``vllm-power bench report``: the tables in the README and the plots in docs/results, drawn from the recorded rows."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MARK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.S)


def rows(folder: Path, name: str) -> list[Row]:
    """The rows of ``folder``/``name``.jsonl; none where there is no such file."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def latest(measured: list[Row]) -> dict[tuple[str, int, int, str], float]:
    """{(bench, batch, context, impl): median ms}; of rows that measured the same, the last."""
    return {(row["bench"], row["batch"], row["context"], row["impl"]): row["median_ms"] for row in measured}


def serve_table(measured: list[Row]) -> str:
    """vLLM end to end: time to first token and decode steps, dense against the pattern."""
    names = {"ttft": "time to first token", "decode_step": "decode step"}
    return _table(measured, names, "dense", "FLASH_ATTN ms", "power ms")


def cpu_table(measured: list[Row]) -> str:
    """Attention steps on a CPU, vLLM's dense backend against the pattern."""
    names = {"prefill": "prefill", "prefill_2048": "prefill of the last 2,048", "decode": "decode"}
    return _table(measured, names, "dense", "dense ms", "power ms")


def _table(measured: list[Row], names: dict[str, str], peer: str, *columns: str) -> str:
    times = latest(measured)
    lines = [f"| | batch | context | {' | '.join(columns)} | ratio |", "| --- " * (len(columns) + 4) + "|"]
    for bench, batch, context, impl in times:
        other = times.get((bench, batch, context, peer))
        if impl == "power" and bench in names and other is not None:
            ours = times[bench, batch, context, impl]
            lines.append(
                f"| {names[bench]} | {batch} | {context:,} | {other:.4g} | {ours:.4g} | {other / ours:.2f}x |"
            )
    return f"{_machine(measured[-1])}\n\n" + "\n".join(lines) + "\n"


def _machine(row: Row) -> str:
    versions = row["versions"]
    where = row["gpu"] or row.get("cpu")
    return (
        f"{where}, vLLM {versions['vllm']}, torch {versions['torch']}, {row['date']}, commit {row['commit']}:"
    )


TABLES: dict[str, Callable[[list[Row]], str]] = {"serve": serve_table, "cpu": cpu_table}


def filled(text: str, folder: Path) -> str:
    """``text`` with every marked table drawn anew from the rows in ``folder``."""

    def replace(match: re.Match[str]) -> str:
        measured = rows(folder, match[2])
        return f"{match[1]}{TABLES[match[2]](measured)}{match[3]}" if measured else match[0]

    return MARK.sub(replace, text)


def plot(folder: Path) -> Path:
    """Draw the ratios of serve.jsonl by context into ``folder``/serve.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-power"  # the same rows give the same file
    import matplotlib.pyplot as plt

    times = latest(rows(folder, "serve"))
    figure, axes = plt.subplots(figsize=(7, 4))
    lines: dict[str, list[tuple[int, float]]] = {}
    for (bench, batch, context, impl), ms in times.items():
        if impl == "dense" and bench in ("ttft", "decode_step"):
            label = "time to first token" if bench == "ttft" else f"decode step, batch {batch}"
            lines.setdefault(label, []).append((context, ms / times[bench, batch, context, "power"]))
    for label, points in sorted(lines.items()):
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(
        xscale="log", xlabel="context, tokens", ylabel="times faster than dense", title="vLLM, Qwen2-7B shape"
    )
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.tight_layout()
    path = folder / "serve.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def main(page: Path = Path("README.md"), folder: Path = Path("docs/results")) -> None:
    """Draw the tables of ``page`` and the plots anew."""
    page.write_text(filled(page.read_text(), folder))
    if rows(folder, "serve"):
        plot(folder)
