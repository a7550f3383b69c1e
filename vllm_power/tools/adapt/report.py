"""What a run leaves to read: rows, two plots and a table. The same rows give the same files."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_power.tools.adapt.settings import Settings
from vllm_power.tools.common.plots import pyplot, save

Row = dict[str, Any]
LOSS = "loss"
PERPLEXITY = "perplexity"


def write(rows: list[Row], folder: Path, name: str) -> Path:
    """Write one JSON object per line to ``folder``/``name``.jsonl, which is replaced."""
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_losses(history: list[Row], settings: Settings, folder: Path) -> None:
    """The losses of all steps as rows and as a plot. history: what the trainer logged."""
    rows = [
        {
            "step": entry["step"],
            "tokens": entry["step"] * settings.batch_tokens,
            "length": settings.length_at(entry["step"] - 1),
            **{name: entry[name] for name in ("loss", "grad_norm", "learning_rate")},
        }
        for entry in history
        if "loss" in entry
    ]
    if rows:
        write(rows, folder, LOSS)
        plot_loss(rows, folder)


def plot_loss(rows: list[Row], folder: Path) -> Path:
    """The loss of each step by the tokens trained so far, one colour a length. rows: step, tokens, length, loss."""
    figure, axes = pyplot().subplots(figsize=(7, 3.5))
    for length in dict.fromkeys(row["length"] for row in rows):
        part = [row for row in rows if row["length"] == length]
        axes.plot(
            [row["tokens"] / 1e6 for row in part], [row["loss"] for row in part], label=f"{length:,} tokens"
        )
    axes.set(xlabel="million tokens trained", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, folder / f"{LOSS}.svg")


def plot_perplexity(rows: list[Row], folder: Path) -> Path:
    """Perplexity by length: before and after, dense and under the pattern."""
    figure, axes = pyplot().subplots(figsize=(7, 3.5))
    for when, style in (("before", "--"), ("after", "-")):
        part = sorted((row for row in rows if row["when"] == when), key=lambda row: row["length"])
        for name, colour in (("dense", "tab:grey"), ("power", "tab:blue")):
            told = f"{when}, {'dense' if name == 'dense' else 'under the pattern'}"
            values = [row[name] for row in part]
            axes.plot([row["length"] for row in part], values, style, color=colour, marker="o", label=told)
    lengths = sorted({row["length"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens of a window", ylabel="perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, folder / f"{PERPLEXITY}.svg")


def table(rows: list[Row]) -> Table:
    """Perplexity at each length."""
    shown = Table(title="Perplexity on held-out text", title_justify="left")
    shown.add_column("tokens", justify="right")
    found = {(row["when"], row["length"]): row for row in rows}
    columns = [(when, name) for when in ("before", "after") for name in ("dense", "power")]
    for when, name in columns:
        shown.add_column(f"{name}, {when}", justify="right")
    for length in sorted({row["length"] for row in rows}):
        values = [found.get((when, length), {}).get(name) for when, name in columns]
        shown.add_row(f"{length:,}", *("" if value is None else f"{value:.3f}" for value in values))
    return shown


def recall_table(rows: list[Row]) -> Table | None:
    """Right answers at each length; None where nothing was asked."""
    asked = [row for row in rows if row.get("asked")]
    if not asked:
        return None
    shown = Table(title="Facts recalled from held-out text", title_justify="left")
    for column in ("when", "tokens", "dense", "power", "asked"):
        shown.add_column(column, justify="right")
    for row in asked:
        told = (row["when"], f"{row['length']:,}", row["recall_dense"], row["recall_power"], row["asked"])
        shown.add_row(*map(str, told))
    return shown
